"""Endpoints: pointers that move by compare-and-swap; every move is a row of their history."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from registry import moves, tables
from registry.errors import Conflict, NotFound, PreconditionFailed
from registry.moves import State
from registry.pages import Page
from registry.versions import get_ready_version, override_rejection


@dataclass(frozen=True)
class Endpoint:
    tenant: str
    name: str
    generation: int
    state: State
    created_at: float

    @property
    def head(self) -> str:
        """The version edits build on.

        Raises:
            Conflict: the endpoint is split between versions.
        """
        if len(self.state) != 1:
            raise Conflict(
                f"endpoint {self.name!r} is split between {len(self.state)} versions;"
                f" POST /v1/endpoints/{self.name}/promote first",
                code="endpoint_split",
            )
        return self.state[0].version


def get_endpoint(connection: Connection, tenant: str, name: str) -> Endpoint:
    row = _row(connection, tenant, name)
    if row is None or row.deleted:
        raise NotFound(
            f"endpoint {name!r} does not exist; GET /v1/endpoints lists those that do",
            code="endpoint_not_found",
        )
    return _endpoint(row)


def endpoint_at(connection: Connection, tenant: str, name: str, generation: int) -> Endpoint:
    """The endpoint, for a change of what was seen of it at ``generation``.

    Raises:
        NotFound; PreconditionFailed: it moved meanwhile.
    """
    endpoint = get_endpoint(connection, tenant, name)
    if endpoint.generation != generation:
        raise _stale(name, generation, endpoint.generation)
    return endpoint


def list_endpoints(
    connection: Connection, tenant: str, *, after: str | None = None, limit: int = 20
) -> Page[Endpoint]:
    """By name."""
    table = tables.endpoints
    query = select(table).where(table.c.tenant == tenant, table.c.deleted.is_(False))
    if after is not None:
        query = query.where(table.c.name > after)
    rows = connection.execute(query.order_by(table.c.name).limit(limit + 1)).all()
    return Page(tuple(_endpoint(row) for row in rows[:limit]), len(rows) > limit)


def list_moved(connection: Connection, seen: Mapping[tuple[str, str], int]) -> list[Endpoint]:
    """Endpoints of every tenant at another generation than was seen, by (tenant, name)."""
    table = tables.endpoints
    rows = connection.execute(
        select(table.c.tenant, table.c.name, table.c.generation).where(table.c.deleted.is_(False))
    )
    moved = [(tenant, name) for tenant, name, now in rows if seen.get((tenant, name)) != now]
    return [get_endpoint(connection, tenant, name) for tenant, name in moved]


def create_endpoint(
    connection: Connection,
    tenant: str,
    name: str,
    state: State,
    *,
    actor: str,
    message: str | None = None,
) -> Endpoint:
    """A new endpoint; one that was deleted continues its generations.

    Raises:
        PreconditionFailed: it exists already.
    """
    row = _row(connection, tenant, name)
    if row is not None and not row.deleted:
        raise PreconditionFailed(
            f"endpoint {name!r} exists already (generation {row.generation});"
            " to move it, send its ETag in If-Match"
        )
    _check_state(connection, tenant, state)
    now = time.time()
    if row is None:
        connection.execute(
            insert(tables.endpoints).values(
                tenant=tenant,
                name=name,
                generation=0,
                state=moves.to_json(state),
                deleted=False,
                created_at=now,
            )
        )
        generation = 0
    else:
        generation = row.generation
    _swap(connection, tenant, name, generation, state)
    moves.record(
        connection,
        tenant,
        name,
        generation=generation + 1,
        kind="create",
        before=None,
        after=state,
        actor=actor,
        message=message,
    )
    return get_endpoint(connection, tenant, name)


def move_endpoint(
    connection: Connection,
    tenant: str,
    name: str,
    state: State,
    *,
    generation: int,
    kind: str,
    actor: str,
    job_id: str | None = None,
    message: str | None = None,
) -> Endpoint:
    """Point an endpoint at ``state`` if it is still at ``generation``.

    Raises:
        NotFound, PreconditionFailed (it moved meanwhile), and what ``get_ready_version`` raises.
    """
    endpoint = endpoint_at(connection, tenant, name, generation)
    _check_state(connection, tenant, state)
    _swap(connection, tenant, name, generation, state)
    moves.record(
        connection,
        tenant,
        name,
        generation=generation + 1,
        kind=kind,
        before=endpoint.state,
        after=state,
        actor=actor,
        previous=moves.get_move(connection, tenant, name, generation).origin,
        job_id=job_id,
        message=message,
    )
    return get_endpoint(connection, tenant, name)


def rollback_endpoint(
    connection: Connection,
    tenant: str,
    name: str,
    *,
    actor: str,
    steps: int = 1,
    to_version: str | None = None,
    to_generation: int | None = None,
    generation: int | None = None,
    message: str | None = None,
) -> tuple[Endpoint, Endpoint]:
    """Restore the whole state that a move replaced; returns the endpoint before and after.

    Goes ``steps`` back, or back to ``to_generation``, or to the newest earlier state that is all
    ``to_version``.

    Raises:
        NotFound, Conflict (nothing to go back to), Gone (a version of that state was deleted),
        PreconditionFailed (it is not at ``generation``).
    """
    before = get_endpoint(connection, tenant, name)
    if generation is not None and generation != before.generation:
        raise _stale(name, generation, before.generation)
    head = moves.get_move(connection, tenant, name, before.generation)
    target = moves.undo_target(connection, tenant, name, head, steps, to_version, to_generation)
    if target.after is None:
        raise Conflict(
            f"endpoint {name!r}: generation {target.generation} is its deletion",
            code="nothing_to_roll_back",
        )
    _check_state(connection, tenant, target.after)
    _swap(connection, tenant, name, before.generation, target.after)
    moves.record(
        connection,
        tenant,
        name,
        generation=before.generation + 1,
        kind="rollback",
        before=before.state,
        after=target.after,
        actor=actor,
        origin=target.origin,
        previous=target.previous,
        message=message,
    )
    return before, get_endpoint(connection, tenant, name)


def delete_endpoint(
    connection: Connection, tenant: str, name: str, *, generation: int, actor: str
) -> None:
    endpoint = get_endpoint(connection, tenant, name)
    _swap(connection, tenant, name, generation, endpoint.state, deleted=True)
    moves.record(
        connection,
        tenant,
        name,
        generation=generation + 1,
        kind="delete",
        before=endpoint.state,
        after=None,
        actor=actor,
    )


def force_state(
    connection: Connection, tenant: str, state: State, *, actor: str, message: str | None = None
) -> None:
    """Make the rejected ones among a state's versions ready, on record: whoever then moves an
    endpoint there, in the same transaction, overrides their guards.

    Raises:
        NotFound
    """
    for target in state:
        override_rejection(connection, tenant, target.version, actor=actor, message=message)


def _swap(
    connection: Connection,
    tenant: str,
    name: str,
    generation: int,
    state: State,
    *,
    deleted: bool = False,
) -> None:
    """The compare-and-swap that every move goes through."""
    table = tables.endpoints
    swapped = connection.execute(
        update(table)
        .where(table.c.tenant == tenant, table.c.name == name, table.c.generation == generation)
        .values(generation=generation + 1, state=moves.to_json(state), deleted=deleted)
    )
    if swapped.rowcount != 1:
        raise _stale(name, generation, get_endpoint(connection, tenant, name).generation)


def _check_state(connection: Connection, tenant: str, state: State) -> None:
    """Every version exists, is ready, and all are of one base."""
    bases = {get_ready_version(connection, tenant, t.version).manifest.base for t in state}
    if len(bases) != 1:
        raise Conflict(
            "a split must be between versions of one base;"
            f" these are of {', '.join(sorted(base.name for base in bases))}",
            code="split_bases",
        )


def _stale(name: str, expected: int, actual: int) -> PreconditionFailed:
    return PreconditionFailed(
        f"endpoint {name!r} is at generation {actual}, not {expected};"
        " GET it again and repeat with the new ETag"
    )


def _row(connection: Connection, tenant: str, name: str) -> Row[Any] | None:
    table = tables.endpoints
    return connection.execute(
        select(table).where(table.c.tenant == tenant, table.c.name == name)
    ).one_or_none()


def _endpoint(row: Row[Any]) -> Endpoint:
    return Endpoint(
        row.tenant, row.name, row.generation, moves.from_json(row.state), row.created_at
    )
