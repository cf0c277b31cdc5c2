"""The audit log: who changed what, from what, to what. Entries are only ever added; the database
itself refuses to change one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, insert, select

from registry import tables
from registry.pages import Page, newest_first

#: What an entry may hold of a state: JSON.
State = Mapping[str, Any] | Sequence[Any] | None


@dataclass(frozen=True)
class Entry:
    """A row of the audit table.

    Attributes:
        action: what was changed and how, as ``endpoint.rollback``.
        object: the id or the name of what was changed.
    """

    seq: int
    actor: str
    action: str
    object: str
    before: Any
    after: Any
    created_at: float


def record(
    connection: Connection,
    tenant: str,
    *,
    actor: str,
    action: str,
    object: str,
    before: State = None,
    after: State = None,
) -> None:
    """Write an entry, in the transaction that makes the change."""
    connection.execute(
        insert(tables.audit).values(
            tenant=tenant,
            actor=actor,
            action=action,
            object=object,
            before=before,
            after=after,
            created_at=time.time(),
        )
    )


def entries(
    connection: Connection,
    tenant: str,
    *,
    actor: str | None = None,
    action: str | None = None,
    object: str | None = None,
    after: int | None = None,
    limit: int = 20,
) -> Page[Entry]:
    """Newest first; of ``action`` all that begin with it (``endpoint``, ``endpoint.rollback``)."""
    table = tables.audit
    query = select(table).where(table.c.tenant == tenant)
    if actor is not None:
        query = query.where(table.c.actor == actor)
    if action is not None:
        query = query.where(table.c.action.startswith(action, autoescape=True))
    if object is not None:
        query = query.where(table.c.object == object)
    return newest_first(connection, query, table.c.seq, _to_entry, before=after, limit=limit)


def _to_entry(row: Row[Any]) -> Entry:
    return Entry(row.seq, row.actor, row.action, row.object, row.before, row.after, row.created_at)
