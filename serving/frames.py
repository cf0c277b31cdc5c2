"""Frames on a stream: four bytes of length, then JSON."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Mapping
from typing import Any

#: Longest frame; a longer one ends the connection.
MAX_FRAME = 64 * 2**20
_HEADER = struct.Struct("!I")


class FrameError(Exception):
    """The other side sent no frame of this protocol."""


def encode_frame(body: Mapping[str, Any]) -> bytes:
    data = json.dumps(body, separators=(",", ":")).encode()
    if len(data) > MAX_FRAME:
        raise FrameError(f"a frame of {len(data)} bytes; the longest is {MAX_FRAME}")
    return _HEADER.pack(len(data)) + data


async def read_frame(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next frame, or None where the stream ends between frames.

    Raises:
        FrameError: the stream ended inside a frame, or holds something else.
    """
    try:
        header = await reader.readexactly(_HEADER.size)
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise FrameError("the stream ended inside a frame") from error
        return None
    (length,) = _HEADER.unpack(header)
    if length > MAX_FRAME:
        raise FrameError(f"a frame of {length} bytes; the longest is {MAX_FRAME}")
    try:
        body = json.loads(await reader.readexactly(length))
    except asyncio.IncompleteReadError as error:
        raise FrameError("the stream ended inside a frame") from error
    except ValueError as error:
        raise FrameError(f"a frame is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise FrameError("a frame is not a JSON object")
    return body
