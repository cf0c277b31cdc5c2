"""Where a sequence's keys and values lie: contiguous spans of slots, first fit."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Span:
    """Slots ``start`` to ``start + size - 1`` of the pool."""

    start: int
    size: int


class SpanAllocator:
    """Hands out spans of ``capacity`` slots; freed neighbours join again."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free = [Span(0, capacity)]  # by start, none touching another

    @property
    def used(self) -> int:
        return self.capacity - sum(span.size for span in self._free)

    def allocate(self, size: int) -> Span | None:
        """The first free span of ``size`` slots; None while there is none."""
        for index, free in enumerate(self._free):
            if free.size < size:
                continue
            if free.size == size:
                del self._free[index]
            else:
                self._free[index] = Span(free.start + size, free.size - size)
            return Span(free.start, size)
        return None

    def free(self, span: Span) -> None:
        insort(self._free, span)
        joined: list[Span] = []
        for free in self._free:
            if joined and joined[-1].start + joined[-1].size == free.start:
                joined[-1] = Span(joined[-1].start, joined[-1].size + free.size)
            else:
                joined.append(free)
        self._free = joined
