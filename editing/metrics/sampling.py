"""Which of many items are looked at, where looking at all would take too long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def spaced(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` items, evenly spaced: the same ones every time."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]
