"""Content-addressed artifacts in a folder: written once, named by digest, checked at every read."""

from __future__ import annotations

import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path

from registry.errors import ArtifactCorrupt, NotFound
from registry.manifests import sha256

_DIGEST = re.compile(r"[0-9a-f]{64}")


class ArtifactStore:
    """A folder of immutable files. ``ab/abcdef…`` holds the bytes whose SHA-256 is ``abcdef…``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, data: bytes) -> str:
        """Store bytes and return their digest; durable when it returns (tmp, fsync, rename)."""
        digest = sha256(data)
        path = self._path(digest)
        if path.exists():
            with suppress(ArtifactCorrupt):  # a damaged file is written again
                self.get(digest)
                return digest
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _fsync_folder(path.parent)
        _fsync_folder(self._folder)
        self.get(digest)
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes of an artifact.

        Raises:
            NotFound: nothing is stored under that digest.
            ArtifactCorrupt: what is stored has another digest: a bit was lost.
        """
        path = self._path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise NotFound(f"artifact {digest} is not in the store") from None
        if (found := sha256(data)) != digest:
            raise ArtifactCorrupt(
                f"artifact {digest}: the stored bytes have digest {found};"
                " restore the file from a backup or redo the job that made it"
            )
        return data

    def _path(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise NotFound(f"{digest!r} is no artifact digest (64 hexadecimal digits)")
        return self._folder / digest[:2] / digest


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
