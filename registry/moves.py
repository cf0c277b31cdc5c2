"""Moves: the history of an endpoint, and where an undo of it leads.

A move writes one row: the state before and after, its ``origin`` (the generation whose state it
shows) and ``previous`` (the origin that an undo of it goes back to). A forward move at generation
g has origin g and previous = the origin before it; a rollback to origin p copies p's state and is
of origin p, so a second rollback goes further back and never to and fro.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, insert, select

from registry import audit, tables, webhooks
from registry.errors import Conflict
from registry.pages import Page, newest_first


@dataclass(frozen=True)
class Target:
    """A version and its share of an endpoint's requests."""

    version: str
    weight: float = 1.0


State = tuple[Target, ...]


@dataclass(frozen=True)
class Move:
    """One row of an endpoint's history."""

    generation: int
    kind: str  # create, set, activate, promote, rollback or delete
    before: State | None
    after: State | None
    origin: int
    previous: int | None
    job_id: str | None
    actor: str
    message: str | None
    created_at: float


def record(
    connection: Connection,
    tenant: str,
    name: str,
    *,
    generation: int,
    kind: str,
    before: State | None,
    after: State | None,
    actor: str,
    origin: int | None = None,
    previous: int | None = None,
    job_id: str | None = None,
    message: str | None = None,
) -> None:
    """Write a move; without ``origin`` it is a forward one."""
    states = [None if state is None else to_json(state) for state in (before, after)]
    audit.record(
        connection,
        tenant,
        actor=actor,
        action=f"endpoint.{kind}",
        object=name,
        before=states[0],
        after=states[1],
    )
    connection.execute(
        insert(tables.moves).values(
            tenant=tenant,
            endpoint=name,
            generation=generation,
            kind=kind,
            before=states[0],
            after=states[1],
            origin=generation if origin is None else origin,
            previous=previous,
            job_id=job_id,
            actor=actor,
            message=message,
            created_at=time.time(),
        )
    )
    told = {
        "name": name,
        "generation": generation,
        "kind": kind,
        "before": states[0],
        "after": states[1],
        "actor": actor,
        "job": job_id,
        "message": message,
    }
    webhooks.announce(connection, tenant, webhooks.MOVED, told)


def history(
    connection: Connection, tenant: str, name: str, *, after: int | None = None, limit: int = 20
) -> Page[Move]:
    """Newest first."""
    table = tables.moves
    query = select(table).where(table.c.tenant == tenant, table.c.endpoint == name)
    return newest_first(connection, query, table.c.generation, _to_move, before=after, limit=limit)


def moved_since(connection: Connection, tenant: str, name: str, generation: int) -> tuple[str, ...]:
    """The kinds of the moves after ``generation``, oldest first."""
    table = tables.moves
    rows = connection.execute(
        select(table.c.kind)
        .where(table.c.tenant == tenant, table.c.endpoint == name, table.c.generation > generation)
        .order_by(table.c.generation)
    )
    return tuple(row.kind for row in rows)


def undo_target(
    connection: Connection,
    tenant: str,
    name: str,
    head: Move,
    steps: int,
    to_version: str | None,
    to_generation: int | None,
) -> Move:
    """The move whose state a rollback from ``head`` restores. Raises Conflict: there is none."""
    if to_generation is not None:
        if not 1 <= to_generation < head.generation:
            raise Conflict(
                f"endpoint {name!r} is at generation {head.generation};"
                f" to_generation must lie between 1 and {head.generation - 1}",
                code="nothing_to_roll_back",
            )
        return get_move(connection, tenant, name, to_generation)
    current, taken = head, 0
    while current.previous is not None:
        current, taken = get_move(connection, tenant, name, current.previous), taken + 1
        if to_version is not None:
            if current.after == (Target(to_version),):
                return current
        elif taken == steps:
            return current
    if to_version is not None:
        message = f"was never all at version {to_version!r} before its present state"
    else:
        message = f"has {taken} earlier state(s) to go back to, {steps} were asked for"
    raise Conflict(
        f"endpoint {name!r} {message}; GET /v1/endpoints/{name}/history shows them",
        code="nothing_to_roll_back",
    )


def get_move(connection: Connection, tenant: str, name: str, generation: int) -> Move:
    table = tables.moves
    row = connection.execute(
        select(table).where(
            table.c.tenant == tenant, table.c.endpoint == name, table.c.generation == generation
        )
    ).one()
    return _to_move(row)


def to_json(state: State) -> list[dict[str, object]]:
    return [{"version": t.version, "weight": t.weight} for t in state]


def from_json(state: list[dict[str, Any]]) -> State:
    return tuple(Target(t["version"], t["weight"]) for t in state)


def _to_move(row: Row[Any]) -> Move:
    return Move(
        generation=row.generation,
        kind=row.kind,
        before=None if row.before is None else from_json(row.before),
        after=None if row.after is None else from_json(row.after),
        origin=row.origin,
        previous=row.previous,
        job_id=row.job_id,
        actor=row.actor,
        message=row.message,
        created_at=row.created_at,
    )
