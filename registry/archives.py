"""Zip archives: written without compression, read by exact names, never extracted to a path."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import BinaryIO
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from registry.artifacts import CHUNK_BYTES
from registry.errors import UnprocessableRequest

MEMBERS = 10_000
#: Most that is read at once: an archive's list of members among it.
READ_BYTES = 4 * 2**20
_TIME = (1980, 1, 1, 0, 0, 0)
_BROKEN = (
    BadZipFile,
    EOFError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,  # a member that is encrypted
    ValueError,
    struct.error,
    zlib.error,
)


def write_zip(stream: BinaryIO, members: Iterable[tuple[str, Iterable[bytes]]]) -> None:
    """Write members in their order, a chunk at a time; equal members give equal bytes."""
    with ZipFile(stream, "w", ZIP_STORED) as archive:
        for name, chunks in members:
            info = ZipInfo(name, _TIME)
            info.external_attr = 0o644 << 16
            with archive.open(info, "w", force_zip64=True) as member:
                for chunk in chunks:
                    member.write(chunk)


class Archive:
    """A zip that a client gave.

    Raises:
        UnprocessableRequest: it is none, a name stands in it twice, it holds too many members, or
            they have more bytes than ``limit`` together.
    """

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        with _refusing():
            self._zip = ZipFile(_Bounded(stream))
            members = self._zip.infolist()
            self._sizes = {member.filename: member.file_size for member in members}
        if len(self._sizes) != len(members):
            raise _refused("a name stands in it twice")
        if len(members) > MEMBERS:
            raise _refused(f"it has {len(members)} members; at most {MEMBERS} are read")
        for member in members:
            if member.compress_type not in (ZIP_STORED, ZIP_DEFLATED) or member.flag_bits & 1:
                raise _refused(
                    f"{member.filename!r} is encrypted or compressed in a rare way; zip it plainly"
                )
        if sum(self._sizes.values()) > limit:
            raise _refused(
                f"its members have more than {limit} bytes together, the limit"
                " (ERRATA_MAX_FILE_BYTES)"
            )

    @property
    def names(self) -> list[str]:
        return list(self._sizes)

    def size(self, name: str) -> int:
        """A member's bytes, as the archive says."""
        return self._sizes[name]

    def read(self, name: str) -> bytes:
        """A member's bytes. Raises UnprocessableRequest where they are damaged."""
        return b"".join(self.chunks(name))

    def chunks(self, name: str) -> Iterator[bytes]:
        """A member's bytes in pieces; the last one comes once their checksum was right."""
        with _refusing(), self._zip.open(name) as member:
            while chunk := member.read(CHUNK_BYTES):
                yield chunk


class _Bounded:
    """A file of which no more is read at once than ``READ_BYTES``."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.seek, self.tell, self.seekable = stream.seek, stream.tell, stream.seekable

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(READ_BYTES + 1 if size < 0 else min(size, READ_BYTES + 1))
        if len(data) > READ_BYTES:
            raise BadZipFile("its list of members is too long")
        return data


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except UnprocessableRequest:
        raise
    except _BROKEN as error:
        raise _refused(f"it cannot be read: {error}") from None


def _refused(why: str) -> UnprocessableRequest:
    return UnprocessableRequest(
        f"the file is no zip archive that can be taken: {why}",
        param="file",
        code="archive_refused",
    )
