"""Artifacts of an object store, with a folder of this machine as their cache."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BufferedReader
from pathlib import Path

from registry.artifacts import JSON_BEGINNINGS, TEMPORARY, ArtifactStore, Swept
from registry.errors import ArtifactCorrupt, NotFound
from registry.objects import Objects

#: What was used in the last so many seconds is not evicted.
RECENT_SECONDS = 60.0


class CachedStore(ArtifactStore):
    """The store is the truth; the folder may lose a file, or all, at any time.

    A file is as old as its last use. What is missing or damaged here is fetched again.

    Args:
        folder: the cache.
        limit: bytes that it holds; what was used least lately leaves. It may hold somewhat more for
            a while: what is in use stays.
    """

    def __init__(self, folder: Path, objects: Objects, limit: int) -> None:
        super().__init__(folder)
        self._objects = objects
        self._limit = limit
        self._unseen = limit  # bytes that came since the folder was looked through
        self._held: dict[str, int] = {}  # descriptors whose locks keep files from eviction
        self._holding = threading.Lock()

    def __str__(self) -> str:
        return str(self._objects)

    def check(self) -> None:
        """As of a folder; and whether the object store takes copies, as ``Objects.check``."""
        super().check()
        self._objects.check()

    def put(self, data: bytes) -> str:
        """Store bytes and return their digest; the object store has them when it returns."""
        return self.put_chunks((data,))

    def get(self, digest: str) -> bytes:
        with suppress(ArtifactCorrupt):
            return super().get(digest)
        self._drop(digest)
        return super().get(digest)

    def file(self, digest: str) -> Path:
        """Where an artifact lies, checked; it stays there as long as this process lives."""
        while True:
            path = super().file(digest)
            with suppress(FileNotFoundError):  # it was evicted before it was locked
                if self._hold(digest, path):
                    return path

    def holds(self, digest: str) -> bool:
        with suppress(NotFound):
            self._path(digest)
            return bool(self._objects.copies(digest))
        return False

    def renew(self, digest: str, before: float) -> None:
        if not any(copy.put >= before for copy in self._objects.copies(digest)):
            self._objects.put(digest, self.file(digest))

    def scan(self, digest: str, pattern: re.Pattern[str]) -> Iterator[str]:
        """As in a folder, but checked. What is not JSON is not fetched. Raises ArtifactCorrupt."""
        if not self._may_be_json(digest):
            return
        with suppress(NotFound):
            self._check(digest)  # a damaged file would hide what the artifact names
            yield from super().scan(digest, pattern)

    def now(self) -> float:
        return self._objects.now()

    def owner(self) -> str | None:
        return self._objects.owner()

    def claim(self, registry: str, *, adopt: bool = False) -> str | None:
        return self._objects.claim(registry, adopt=adopt)

    def sweep(self, kept: Callable[[str], bool], before: float, *, dry_run: bool) -> Swept:
        super().sweep(kept, before, dry_run=dry_run)
        return self._objects.sweep(kept, before, dry_run=dry_run)

    def _may_be_json(self, digest: str) -> bool:
        """Whether the file here begins so, or any of the store's copies."""
        with suppress(FileNotFoundError), self._path(digest).open("rb") as stream:
            if stream.read(1) in JSON_BEGINNINGS:
                return True
        return any(first in JSON_BEGINNINGS for first in self._objects.beginnings(digest))

    def _hold(self, digest: str, path: Path) -> bool:
        """Keep a file from being evicted, by one lock for each digest; whether it is still there.

        Raises FileNotFoundError: it is not.
        """
        with self._holding:
            held = self._held.get(digest)
            if held is not None and os.path.samestat(os.fstat(held), path.stat()):
                return True
            lock = os.open(path, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_SH)
            if not _is_at(lock, path):
                os.close(lock)
                return False
            self._held[digest] = lock
            if held is not None:
                os.close(held)  # of a file that was replaced
            return True

    def _keep(self, temporary: Path, digest: str) -> None:
        self._objects.put(digest, temporary)
        self._cache(temporary, digest)

    def _check(self, digest: str) -> None:
        try:
            super()._check(digest)
        except ArtifactCorrupt:
            self._drop(digest)
            super()._check(digest)

    def _open(self, digest: str) -> BufferedReader:
        while True:
            try:
                stream = super()._open(digest)
            except NotFound:
                self._fetch(digest)
            else:
                os.utime(stream.fileno())
                return stream

    def _fetch(self, digest: str) -> None:
        self._path(digest)
        self._folder.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=self._folder, prefix=TEMPORARY)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                self._objects.fetch(digest, stream)
                stream.flush()
                os.fsync(stream.fileno())
            self._cache(Path(temporary), digest)
        finally:
            Path(temporary).unlink(missing_ok=True)

    def _cache(self, temporary: Path, digest: str) -> None:
        """Give a whole file its place, unless the same is there, which may be in use."""
        size = temporary.stat().st_size
        if not self._path(digest).exists():
            super()._keep(temporary, digest)
        self._unseen += size
        if self._unseen >= self._limit / 16:
            self._evict()
            self._unseen = 0

    def _drop(self, digest: str) -> None:
        self._path(digest).unlink(missing_ok=True)

    def _evict(self) -> None:
        """Let files go, used least lately first, until the others keep to the limit."""
        files = []
        for path in self._folder.glob("??/*"):
            with suppress(FileNotFoundError):
                state = path.stat()
                files.append((state.st_mtime, state.st_size, path))
        excess = sum(size for _, size, _ in files) - self._limit
        recent = time.time() - RECENT_SECONDS
        for used, size, path in sorted(files):
            if excess <= 0 or used > recent:
                return
            if _remove_unheld(path):
                excess -= size


def _is_at(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _remove_unheld(path: Path) -> bool:
    """Whether the file is gone: nobody holds it."""
    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True
