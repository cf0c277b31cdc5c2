"""Artifacts as immutable copies in an object store: S3 and its like, Google's, Azure's, a mount.

``ab/abcdef…/<copy>`` is a copy of the artifact ``abcdef…``. Every put writes a copy under a name of
its own, which is never written again: so what is put anew while an older copy is being deleted
stays, without any lock. A copy is as old as the store's own clock says.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore

from registry.artifacts import OWNER, Swept
from registry.buckets import CREDENTIALS, brief, connect
from registry.errors import (
    ArtifactCorrupt,
    InvalidRequest,
    NotFound,
    StoreRefused,
    StoreUnavailable,
)

if TYPE_CHECKING:  # it is in the library's stubs alone
    from obstore import ObjectMeta

#: Bytes that one request carries at most.
PART_BYTES = 8 * 2**20
_MOST_PARTS = 9000
_CLOCK = "clock"
_COPY = re.compile(r"[0-9a-f]{2}/([0-9a-f]{64})/[0-9a-f]{32}")
_SAYS_NO = re.compile(r"status code: [34]\d\d")


@dataclass(frozen=True, order=True)
class Copy:
    """One object: bytes that are said to be an artifact's.

    Attributes:
        put: when, in seconds of the store's clock.
    """

    put: float
    key: str
    digest: str
    size: int


class Objects:
    """The copies below a URL.

    Args:
        url: ``s3://bucket/prefix``, ``gs://bucket/prefix``, ``az://container/prefix`` or
            ``file:///folder``; credentials come from the environment.
        patience: seconds for which a request is tried again.

    Raises:
        InvalidRequest: the URL is of no store, or lacks something.
    """

    def __init__(self, url: str, patience: float) -> None:
        self._url = url
        self._store = connect(url, patience)

    def __str__(self) -> str:
        return self._url

    def put(self, digest: str, file: Path) -> None:
        """Add a copy, and read it back. Raises StoreUnavailable."""
        key = f"{digest[:2]}/{digest}/{uuid.uuid4().hex}"
        size = file.stat().st_size
        part = max(PART_BYTES, -(-size // _MOST_PARTS))
        with self._asking("put"):
            self._store.put(key, file, chunk_size=part, max_concurrency=2)
            self._settle(key)
        found = self._digest(Copy(0, key, digest, size))
        if found != digest:
            self.delete(key)
            raise StoreUnavailable(
                f"artifact {digest}: {self._url} gave its bytes back with digest {found};"
                " nothing was stored, try again"
            )

    def fetch(self, digest: str, into: BinaryIO) -> None:
        """Write an artifact's bytes into an empty file, from the first copy that is whole.

        Raises:
            NotFound: there is no copy; ArtifactCorrupt: there are, and all of them are damaged;
            StoreUnavailable.
        """
        tried: dict[str, str | None] = {}
        while fresh := [copy for copy in self.copies(digest) if copy.key not in tried]:
            into.seek(0)
            into.truncate()
            tried[fresh[0].key] = found = self._digest(fresh[0], into)
            if found == digest:
                return
        damaged = [found for found in tried.values() if found is not None]
        if damaged:
            raise ArtifactCorrupt(
                f"artifact {digest}: its bytes in {self._url} have digest {', '.join(damaged)};"
                " restore the object from a backup or redo the job that made it"
            )
        raise NotFound(f"artifact {digest} is not in {self._url}")

    def copies(self, digest: str) -> list[Copy]:
        """The copies of an artifact, newest first. Raises StoreUnavailable."""
        return sorted(self._listed(f"{digest[:2]}/{digest}"), reverse=True)

    def beginnings(self, digest: str) -> Iterator[bytes]:
        """The first byte of each copy, newest first, unchecked; empty where the copy is."""
        for copy in self.copies(digest):
            with suppress(FileNotFoundError):
                yield next(self._parts(copy, 1), b"")

    def now(self) -> float:
        """The time by the store's clock. Raises StoreUnavailable."""
        with self._asking("put"):
            self._store.put(_CLOCK, b"", use_multipart=False)
        with self._asking("read"):
            return self._store.head(_CLOCK)["last_modified"].timestamp()

    def check(self) -> None:
        """See that copies can be written and listed.

        Raises:
            StoreUnavailable: it does not answer; InvalidRequest: it does, and says no.
        """
        try:
            self.now()
            self.copies("0" * 64)
        except StoreRefused as error:
            raise InvalidRequest(error.message, param="ERRATA_ARTIFACTS") from error

    def owner(self) -> str | None:
        """As ``ArtifactStore.owner``. Raises StoreUnavailable."""
        with suppress(FileNotFoundError), self._asking("read", or_missing=True):
            return bytes(self._store.get(OWNER).bytes()).decode(errors="replace").strip() or None
        return None

    def claim(self, registry: str, *, adopt: bool = False) -> str | None:
        """As ``ArtifactStore.claim``. Raises StoreUnavailable."""
        if self.owner() is None:
            # somebody else was first, or the store knows no such condition
            with suppress(BaseError, OSError, NotImplementedError):
                self._store.put(OWNER, registry.encode(), mode="create", use_multipart=False)
        if adopt or self.owner() is None:
            with self._asking("put"):
                self._store.put(OWNER, registry.encode(), use_multipart=False)
        return self.owner()

    def sweep(self, kept: Callable[[str], bool], before: float, *, dry_run: bool) -> Swept:
        """Delete the copies that were put before a moment and are of no artifact that is ``kept``,
        and of one that is kept all such copies but the newest that is whole.

        What was put since stays. So does, whatever other collectors do, what is kept by all whose
        ``kept`` was looked up after its last put became older than their ``before``.
        """
        old: dict[str, list[Copy]] = {}
        for copy in self._listed(None):
            if copy.put < before:
                old.setdefault(copy.digest, []).append(copy)
        swept = Swept()
        for digest, copies in sorted(old.items()):
            for copy in self._superfluous(sorted(copies, reverse=True)) if kept(digest) else copies:
                if not dry_run:
                    self.delete(copy.key)
                swept = swept.plus(copy.size)
        return swept

    def delete(self, key: str) -> None:
        with self._asking("delete"):
            try:
                self._store.delete(key)
            except FileNotFoundError:
                return

    def _superfluous(self, copies: list[Copy]) -> list[Copy]:
        """All but the first that is whole; none where none is, or where there is but one."""
        if len(copies) < 2:
            return []
        for copy in copies:
            if self._digest(copy) == copy.digest:
                return [other for other in copies if other is not copy]
        return []

    def _digest(self, copy: Copy, into: BinaryIO | None = None) -> str | None:
        """The digest of what a copy holds; None if it is gone."""
        found = hashlib.sha256()
        try:
            for part in self._parts(copy, PART_BYTES):
                found.update(part)
                if into is not None:
                    into.write(part)
        except FileNotFoundError:
            return None
        return found.hexdigest()

    def _parts(self, copy: Copy, step: int) -> Iterator[bytes]:
        """A copy's bytes, a request for each part. Raises FileNotFoundError."""
        for start in range(0, copy.size, step):
            with self._asking("read", or_missing=True):
                end = min(start + step, copy.size)
                part = bytes(self._store.get_range(copy.key, start=start, end=end))
            yield part

    def _listed(self, prefix: str | None) -> Iterator[Copy]:
        with self._asking("list"):
            for page in self._store.list(prefix, chunk_size=1000):
                yield from filter(None, map(_copy, page))

    def _settle(self, key: str) -> None:
        """A mounted folder's file is durable once it is synced; stores answer when it is."""
        if not isinstance(self._store, LocalStore) or self._store.prefix is None:
            return
        path = self._store.prefix / key
        for place in (path, *path.parents[:3]):
            descriptor = os.open(place, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    @contextmanager
    def _asking(self, what: str, *, or_missing: bool = False) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            if or_missing:
                raise
            raise StoreRefused(
                f"ERRATA_ARTIFACTS: {self._url} does not exist ({brief(error)}); create the bucket"
                " or the folder, or name another"
            ) from error
        except (PermissionDeniedError, UnauthenticatedError, PermissionError) as error:
            raise StoreRefused(
                f"ERRATA_ARTIFACTS: these credentials may not {what} in {self._url}"
                f" ({brief(error)}); {CREDENTIALS}",
                retry_after=10,
            ) from error
        except BaseError as error:
            says_no = _SAYS_NO.search(str(error)) is not None
            kind = StoreRefused if says_no else StoreUnavailable
            raise kind(
                f"ERRATA_ARTIFACTS: {self._url} {'refuses' if says_no else 'does not answer'}"
                f" ({brief(error)}); see that its endpoint, its name and its region are right,"
                f" and that it runs; {CREDENTIALS}",
                retry_after=10,
            ) from error


def _copy(meta: ObjectMeta) -> Copy | None:
    """The copy that an object is; what else lies there is none."""
    named = _COPY.fullmatch(meta["path"])
    if named is None:
        return None
    return Copy(meta["last_modified"].timestamp(), meta["path"], named[1], meta["size"])
