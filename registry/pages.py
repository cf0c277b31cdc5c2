"""Parts of lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Page(Generic[T]):
    """A part of a list, in its order, and whether more follows."""

    items: tuple[T, ...]
    has_more: bool
