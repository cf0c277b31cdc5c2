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
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore, from_url

from registry.artifacts import Swept
from registry.errors import (
    ArtifactCorrupt,
    InvalidRequest,
    NotFound,
    StoreRefused,
    StoreUnavailable,
)

if TYPE_CHECKING:  # these are in the library's stubs alone
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

SCHEMES = ("s3", "gs", "az", "file")
#: Bytes that one request carries at most.
PART_BYTES = 16 * 2**20
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
        self._store = _connect(url, patience)

    def put(self, digest: str, file: Path) -> None:
        """Add a copy, and read it back. Raises StoreUnavailable."""
        key = f"{digest[:2]}/{digest}/{uuid.uuid4().hex}"
        size = file.stat().st_size
        part = max(PART_BYTES, -(-size // _MOST_PARTS))
        with self._asking("put"):
            self._store.put(key, file, chunk_size=part, max_concurrency=4)
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

    def beginning(self, digest: str) -> bytes:
        """The first byte of an artifact, unchecked; empty where it is, or where there is none."""
        for copy in self.copies(digest):
            try:
                return next(self._parts(copy, 1), b"")
            except FileNotFoundError:
                continue
        return b""

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
                f"ERRATA_ARTIFACTS: {self._url} does not exist ({_brief(error)}); create the bucket"
                " or the folder, or name another"
            ) from error
        except (PermissionDeniedError, UnauthenticatedError, PermissionError) as error:
            raise StoreRefused(
                f"ERRATA_ARTIFACTS: these credentials may not {what} in {self._url}"
                f" ({_brief(error)}); {_CREDENTIALS}",
                retry_after=10,
            ) from error
        except BaseError as error:
            says_no = _SAYS_NO.search(str(error)) is not None
            kind = StoreRefused if says_no else StoreUnavailable
            raise kind(
                f"ERRATA_ARTIFACTS: {self._url} {'refuses' if says_no else 'does not answer'}"
                f" ({_brief(error)}); see that its endpoint, its name and its region are right,"
                f" and that it runs; {_CREDENTIALS}",
                retry_after=10,
            ) from error


_CREDENTIALS = (
    "credentials are taken from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and"
    " AWS_ENDPOINT_URL, from GOOGLE_APPLICATION_CREDENTIALS, or from AZURE_STORAGE_ACCOUNT_NAME"
    " and AZURE_STORAGE_ACCOUNT_KEY"
)


def _connect(url: str, patience: float) -> ObjectStore:
    scheme, _, rest = url.partition("://")
    if scheme not in SCHEMES:
        raise InvalidRequest(
            f"ERRATA_ARTIFACTS is {url!r}: {scheme}:// is no object store that is known; take one"
            f" of {', '.join(f'{known}://' for known in SCHEMES)}, or the path of a folder",
            param="ERRATA_ARTIFACTS",
        )
    if not rest.strip("/"):
        raise InvalidRequest(
            f"ERRATA_ARTIFACTS is {url!r} and names no bucket or folder; write it as"
            f" {scheme}://{'/folder' if scheme == 'file' else 'bucket/prefix'}",
            param="ERRATA_ARTIFACTS",
        )
    seconds = timedelta(seconds=patience)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    try:
        if scheme == "file":
            return from_url(url, automatic_cleanup=True)
        return from_url(
            url,
            # one is deleted at a time, and not every S3 knows how to delete many
            config={"disable_bulk_delete": True} if scheme == "s3" else None,
            client_options={
                "allow_http": scheme != "s3" or endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=min(5.0, patience)),
                "timeout": seconds,
            },
            retry_config={
                "max_retries": 1000,
                "retry_timeout": seconds,
                "backoff": {
                    "init_backoff": timedelta(seconds=0.1),
                    "max_backoff": timedelta(seconds=2),
                    "base": 2,
                },
            },
        )
    except (BaseError, OSError) as error:
        raise InvalidRequest(
            f"ERRATA_ARTIFACTS: {url} cannot be used ({_brief(error)}); {_CREDENTIALS}",
            param="ERRATA_ARTIFACTS",
        ) from error


def _copy(meta: ObjectMeta) -> Copy | None:
    """The copy that an object is; what else lies there is none."""
    named = _COPY.fullmatch(meta["path"])
    if named is None:
        return None
    return Copy(meta["last_modified"].timestamp(), meta["path"], named[1], meta["size"])


def _brief(error: Exception) -> str:
    """What the library says, without its inner state and the store's XML."""
    return str(error).partition("\n")[0][:300]
