"""Content-addressed artifacts in a folder: written once, named by digest, checked at every read."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from registry import failpoints
from registry.errors import ArtifactCorrupt, NotFound
from registry.manifests import canonical_json, sha256
from registry.rows import StoredRows

CHUNK_BYTES = 2**20
TEMPORARY = ".tmp-"
#: Beside the artifacts: the name of the registry that they are of.
OWNER = "registry"
JSON_BEGINNINGS = (b"{", b"[", b'"')
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Swept:
    """How many artifacts were deleted, and their bytes."""

    count: int = 0
    size: int = 0

    def plus(self, size: int | None) -> Swept:
        return self if size is None else Swept(self.count + 1, self.size + size)


class ArtifactStore:
    """A folder of immutable files. ``ab/abcdef…`` holds the bytes whose SHA-256 is ``abcdef…``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def check(self) -> None:
        """Whether something can be put: a file is made and removed. Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix=TEMPORARY) as stream:
            stream.write(b"ready")

    def put(self, data: bytes) -> str:
        """Store bytes and return their digest; durable when it returns (tmp, fsync, rename)."""
        digest = sha256(data)
        with suppress(NotFound, ArtifactCorrupt):  # a damaged file is written again
            self._touch(digest)
            self.get(digest)
            return digest
        return self.put_chunks((data,))

    def put_chunks(self, chunks: Iterable[bytes]) -> str:
        """As ``put``, of which only one chunk is in memory; nothing is left where they raise."""
        self._folder.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=self._folder, prefix=TEMPORARY)
        found = hashlib.sha256()
        try:
            with os.fdopen(descriptor, "wb") as stream:
                for chunk in chunks:
                    found.update(chunk)
                    stream.write(chunk)
                stream.flush()
                os.fsync(stream.fileno())
            failpoints.reach("artifact")
            self._keep(Path(temporary), found.hexdigest())
        finally:
            Path(temporary).unlink(missing_ok=True)
        self._check(found.hexdigest())
        return found.hexdigest()

    def copy(self, source: ArtifactStore, digest: str) -> None:
        """Put another store's artifact.

        Raises:
            NotFound, ArtifactCorrupt: as ``get``, or its bytes changed while they were read.
        """
        _compare(digest, self.put_chunks(source.chunks(digest)))

    def renew(self, digest: str, before: float) -> None:
        """Make an artifact as young as if it was put again, if it was last put before a moment.

        Raises:
            NotFound: it is gone.
        """
        self._touch(digest)

    def put_rows(self, rows: Iterable[Any]) -> str:
        """Store rows as JSON lines, one at a time."""
        return self.put_chunks(canonical_json(row) + b"\n" for row in rows)

    def get(self, digest: str) -> bytes:
        """The bytes of an artifact.

        Raises:
            NotFound: nothing is stored under that digest.
            ArtifactCorrupt: what is stored has another digest: a bit was lost.
        """
        with self._open(digest) as stream:
            data = stream.read()
        _compare(digest, sha256(data))
        return data

    def file(self, digest: str) -> Path:
        """Where an artifact lies, checked, to be read in parts. Raises as ``get``."""
        self._check(digest)
        return self._path(digest)

    def holds(self, digest: str) -> bool:
        """Whether something is stored under a digest."""
        return self._path(digest).is_file()

    def chunks(self, digest: str) -> Iterator[bytes]:
        """The bytes of an artifact in pieces, checked before the first one. Raises as ``get``."""
        self._check(digest)
        return self._chunks(digest)

    def opened(self, digest: str) -> BufferedReader:
        """An artifact as a file, unchecked: for what is read in part. Raises NotFound."""
        return self._open(digest)

    def open(self, digest: str) -> BinaryIO:
        """The artifact as a file to be read, checked first. Raises as ``get``."""
        self._check(digest)
        return self._open(digest)

    def scan(self, digest: str, pattern: re.Pattern[str]) -> Iterator[str]:
        """What matches in an artifact that holds JSON; nothing in one that does not or is gone."""
        try:
            stream = self._open(digest)
        except NotFound:
            return
        with stream:
            if stream.peek(1)[:1] not in JSON_BEGINNINGS:
                return
            for line in stream:
                yield from pattern.findall(line.decode(errors="replace"))

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for what is to become an artifact; it is gone afterwards."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=TEMPORARY) as folder:
            yield Path(folder)

    def digests(self) -> list[str]:
        """Of every file in the folder."""
        names = sorted(path.name for path in self._folder.glob("??/*"))
        return [name for name in names if _DIGEST.fullmatch(name)]

    def now(self) -> float:
        """The time by the clock that says when an artifact was put."""
        return time.time()

    def owner(self) -> str | None:
        """The registry whose artifacts these are, if one has claimed them."""
        with suppress(FileNotFoundError):
            return (self._folder / OWNER).read_text(errors="replace").strip() or None
        return None

    def claim(self, registry: str, *, adopt: bool = False) -> str | None:
        """Make the artifacts a registry's; whose they are then: ``adopt`` takes them from another,
        without it they stay that one's."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._locked(fcntl.LOCK_EX):
            if adopt or self.owner() is None:
                temporary = self._folder / f"{TEMPORARY}{OWNER}"
                with temporary.open("w") as stream:
                    stream.write(registry)
                    stream.flush()
                    os.fsync(stream.fileno())
                temporary.replace(self._folder / OWNER)
                _fsync_folder(self._folder)
        return self.owner()

    def sweep(self, kept: Callable[[str], bool], before: float, *, dry_run: bool) -> Swept:
        """Delete what was last put before a moment and is not ``kept``, and what a dead process
        left half written.

        What is put meanwhile stays, be it the same bytes.
        """
        swept = self.clear(before, dry_run=dry_run)
        for digest in self.digests():
            if not kept(digest):
                swept = swept.plus(self._remove(self._path(digest), before, dry_run))
        return swept

    def clear(self, before: float, *, dry_run: bool = False) -> Swept:
        """Delete what a dead process left half written in this machine's folder, and nobody has
        written to since a moment."""
        swept = Swept()
        for path in sorted(self._folder.glob(f"{TEMPORARY}*")):
            swept = swept.plus(self._remove(path, before, dry_run))
        return swept

    def _remove(self, path: Path, before: float, dry_run: bool) -> int | None:
        """Its bytes, if it is old and gone (or would be)."""
        with suppress(FileNotFoundError), self._locked(fcntl.LOCK_EX):
            if _modified(path) < before:
                size = _size(path)
                if not dry_run:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                return size
        return None

    @contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        """Between looking at a file's time and deleting it nobody puts it again."""
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            fcntl.flock(folder, kind)
            yield
        finally:
            os.close(folder)

    def rows(self, digest: str) -> StoredRows:
        """The rows that ``put_rows`` stored. Raises as ``get``."""
        self._check(digest)
        return StoredRows(lambda: self._open(digest))

    def _keep(self, temporary: Path, digest: str) -> None:
        """Give a whole file its place; it is durable afterwards."""
        path = self._path(digest)
        path.parent.mkdir(exist_ok=True)
        with self._locked(fcntl.LOCK_SH):
            temporary.replace(path)
        _fsync_folder(path.parent)
        _fsync_folder(self._folder)

    def _chunks(self, digest: str) -> Iterator[bytes]:
        with self._open(digest) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk

    def _check(self, digest: str) -> None:
        with self._open(digest) as stream:
            _compare(digest, hashlib.file_digest(stream, "sha256").hexdigest())

    def _open(self, digest: str) -> BufferedReader:
        try:
            return self._path(digest).open("rb")
        except FileNotFoundError:
            raise NotFound(f"artifact {digest} is not in the store") from None

    def _touch(self, digest: str) -> None:
        """Note that an artifact was put just now."""
        try:
            with self._locked(fcntl.LOCK_SH):
                os.utime(self._path(digest))
        except FileNotFoundError:
            raise NotFound(f"artifact {digest} is not in the store") from None

    def _path(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise NotFound(f"{digest!r} is no artifact digest (64 hexadecimal digits)")
        return self._folder / digest[:2] / digest


def _modified(path: Path) -> float:
    """When a file, or the newest in a folder, was written."""
    return max(part.stat().st_mtime for part in (path, *path.rglob("*")))


def _size(path: Path) -> int:
    return sum(part.stat().st_size for part in (path, *path.rglob("*")) if part.is_file())


def _compare(digest: str, found: str) -> None:
    if found != digest:
        raise ArtifactCorrupt(
            f"artifact {digest}: the stored bytes have digest {found};"
            " restore the file from a backup or redo the job that made it"
        )


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
