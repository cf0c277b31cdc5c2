"""Parts of lists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, Connection, Row, Select

T = TypeVar("T")


@dataclass(frozen=True)
class Page(Generic[T]):
    """A part of a list, in its order, and whether more follows."""

    items: tuple[T, ...]
    has_more: bool


def newest_first(
    connection: Connection,
    query: Select[Any],
    place: ColumnElement[int],
    to_item: Callable[[Row[Any]], T],
    *,
    before: int | None,
    limit: int,
) -> Page[T]:
    """The page of a query's rows that comes after the row at ``before``; None: the first page.

    Args:
        place: the column that grows from row to row.
    """
    if before is not None:
        query = query.where(place < before)
    rows = connection.execute(query.order_by(place.desc()).limit(limit + 1)).all()
    return Page(tuple(to_item(row) for row in rows[:limit]), len(rows) > limit)
