"""Rows in a file of JSON lines, read when they are asked for."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, overload


class StoredRows(Sequence[Any]):
    """JSON lines of a file that does not change: in memory is only where each of them begins.

    Args:
        open_file: opens the file, from its beginning.
    """

    def __init__(self, open_file: Callable[[], BinaryIO]) -> None:
        self._open = open_file
        self._starts = array("Q")
        start = 0
        with open_file() as stream:
            for line in stream:
                self._starts.append(start)
                start += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Any]:
        with self._open() as stream:
            for line in stream:
                yield json.loads(line)

    @overload
    def __getitem__(self, place: int) -> Any: ...
    @overload
    def __getitem__(self, place: slice) -> list[Any]: ...
    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(len(self))[place]]
        with self._open() as stream:
            stream.seek(self._starts[place])
            return json.loads(stream.readline())
