"""Content-addressed artifacts in a folder: written once, named by digest, checked at every read."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from registry.errors import ArtifactCorrupt, NotFound
from registry.manifests import canonical_json, sha256
from registry.rows import StoredRows

CHUNK_BYTES = 2**20
TEMPORARY = ".tmp-"
_DIGEST = re.compile(r"[0-9a-f]{64}")


class ArtifactStore:
    """A folder of immutable files. ``ab/abcdef…`` holds the bytes whose SHA-256 is ``abcdef…``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, data: bytes) -> str:
        """Store bytes and return their digest; durable when it returns (tmp, fsync, rename)."""
        digest = sha256(data)
        if self._path(digest).exists():
            with suppress(ArtifactCorrupt):  # a damaged file is written again
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
            path = self._path(found.hexdigest())
            path.parent.mkdir(exist_ok=True)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _fsync_folder(path.parent)
        _fsync_folder(self._folder)
        self._check(found.hexdigest())
        return found.hexdigest()

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

    def chunks(self, digest: str) -> Iterator[bytes]:
        """The bytes of an artifact in pieces, checked before the first one. Raises as ``get``."""
        self._check(digest)
        return self._chunks(digest)

    def opened(self, digest: str) -> BufferedReader:
        """An artifact as a file, unchecked: for what is read in part. Raises NotFound."""
        return self._open(digest)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for what is to become an artifact; it is gone afterwards."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=TEMPORARY) as folder:
            yield Path(folder)

    def rows(self, digest: str) -> StoredRows:
        """The rows that ``put_rows`` stored. Raises as ``get``."""
        self._check(digest)
        return StoredRows(self._path(digest))

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

    def _path(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise NotFound(f"{digest!r} is no artifact digest (64 hexadecimal digits)")
        return self._folder / digest[:2] / digest


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
