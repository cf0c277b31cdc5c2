"""Endpoints: pointers that move by compare-and-swap, and the history that can undo every move.

A move writes one row: the state before and after, its ``origin`` (the generation whose state it
shows) and ``previous`` (the origin that an undo of it goes back to). A forward move at generation
g has origin g and previous = the origin before it; a rollback to origin p copies p's state and is
of origin p, so a second rollback goes further back and never to and fro.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from registry import tables
from registry.errors import Conflict, NotFound, PreconditionFailed
from registry.versions import Page, get_ready_version


@dataclass(frozen=True)
class Target:
    """A version and its share of an endpoint's requests."""

    version: str
    weight: float = 1.0


State = tuple[Target, ...]


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


def get_endpoint(connection: Connection, tenant: str, name: str) -> Endpoint:
    row = _row(connection, tenant, name)
    if row is None or row.deleted:
        raise NotFound(
            f"endpoint {name!r} does not exist; GET /v1/endpoints lists those that do",
            code="endpoint_not_found",
        )
    return _endpoint(row)


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


def create_endpoint(
    connection: Connection, tenant: str, name: str, state: State, *, actor: str
) -> Endpoint:
    """A new endpoint; one that was deleted continues its generations.

    Raises:
        PreconditionFailed: it exists already.
    """
    _check_state(connection, tenant, state)
    row = _row(connection, tenant, name)
    if row is not None and not row.deleted:
        raise PreconditionFailed(
            f"endpoint {name!r} exists already (generation {row.generation});"
            " to move it, send its ETag in If-Match"
        )
    now = time.time()
    if row is None:
        connection.execute(
            insert(tables.endpoints).values(
                tenant=tenant,
                name=name,
                generation=0,
                state=_to_json(state),
                deleted=False,
                created_at=now,
            )
        )
        generation = 0
    else:
        generation = row.generation
    _swap(connection, tenant, name, generation, state, deleted=False)
    return _record(
        connection, tenant, name, generation + 1, "create", None, state, None, None, actor, None
    )


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
    _check_state(connection, tenant, state)
    endpoint = get_endpoint(connection, tenant, name)
    _swap(connection, tenant, name, generation, state)
    origin = _move(connection, tenant, name, generation).origin
    return _record(
        connection,
        tenant,
        name,
        generation + 1,
        kind,
        endpoint.state,
        state,
        origin,
        job_id,
        actor,
        message,
    )


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
    head = _move(connection, tenant, name, before.generation)
    target = _undo_target(connection, tenant, name, head, steps, to_version, to_generation)
    state = target.after
    if state is None:
        raise Conflict(
            f"endpoint {name!r}: generation {target.generation} is its deletion",
            code="nothing_to_roll_back",
        )
    _check_state(connection, tenant, state)
    _swap(connection, tenant, name, before.generation, state)
    new = before.generation + 1
    connection.execute(
        insert(tables.moves).values(
            tenant=tenant,
            endpoint=name,
            generation=new,
            kind="rollback",
            before=_to_json(before.state),
            after=_to_json(state),
            origin=target.origin,
            previous=target.previous,
            job_id=None,
            actor=actor,
            message=message,
            created_at=time.time(),
        )
    )
    return before, get_endpoint(connection, tenant, name)


def delete_endpoint(
    connection: Connection, tenant: str, name: str, *, generation: int, actor: str
) -> None:
    endpoint = get_endpoint(connection, tenant, name)
    _swap(connection, tenant, name, generation, endpoint.state, deleted=True)
    _record(
        connection,
        tenant,
        name,
        generation + 1,
        "delete",
        endpoint.state,
        None,
        None,
        None,
        actor,
        None,
    )


def history(
    connection: Connection, tenant: str, name: str, *, after: int | None = None, limit: int = 20
) -> Page[Move]:
    """Newest first."""
    table = tables.moves
    query = select(table).where(table.c.tenant == tenant, table.c.endpoint == name)
    if after is not None:
        query = query.where(table.c.generation < after)
    rows = connection.execute(query.order_by(table.c.generation.desc()).limit(limit + 1)).all()
    if not rows and after is None:
        get_endpoint(connection, tenant, name)
    return Page(tuple(_to_move(row) for row in rows[:limit]), len(rows) > limit)


def moved_since(connection: Connection, tenant: str, name: str, generation: int) -> tuple[str, ...]:
    """The kinds of the moves after ``generation``, oldest first."""
    table = tables.moves
    rows = connection.execute(
        select(table.c.kind)
        .where(table.c.tenant == tenant, table.c.endpoint == name, table.c.generation > generation)
        .order_by(table.c.generation)
    )
    return tuple(row.kind for row in rows)


def _undo_target(
    connection: Connection,
    tenant: str,
    name: str,
    head: Move,
    steps: int,
    to_version: str | None,
    to_generation: int | None,
) -> Move:
    if to_generation is not None:
        if not 1 <= to_generation < head.generation:
            raise Conflict(
                f"endpoint {name!r} is at generation {head.generation};"
                f" to_generation must lie between 1 and {head.generation - 1}",
                code="nothing_to_roll_back",
            )
        return _move(connection, tenant, name, to_generation)
    current, taken = head, 0
    while current.previous is not None:
        current, taken = _move(connection, tenant, name, current.previous), taken + 1
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
        .values(generation=generation + 1, state=_to_json(state), deleted=deleted)
    )
    if swapped.rowcount != 1:
        raise _stale(name, generation, get_endpoint(connection, tenant, name).generation)


def _record(
    connection: Connection,
    tenant: str,
    name: str,
    generation: int,
    kind: str,
    before: State | None,
    after: State | None,
    previous: int | None,
    job_id: str | None,
    actor: str,
    message: str | None,
) -> Endpoint:
    connection.execute(
        insert(tables.moves).values(
            tenant=tenant,
            endpoint=name,
            generation=generation,
            kind=kind,
            before=None if before is None else _to_json(before),
            after=None if after is None else _to_json(after),
            origin=generation,
            previous=previous,
            job_id=job_id,
            actor=actor,
            message=message,
            created_at=time.time(),
        )
    )
    row = _row(connection, tenant, name)
    if row is None:
        raise NotFound(f"endpoint {name!r} does not exist")
    return _endpoint(row)


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


def _move(connection: Connection, tenant: str, name: str, generation: int) -> Move:
    table = tables.moves
    row = connection.execute(
        select(table).where(
            table.c.tenant == tenant, table.c.endpoint == name, table.c.generation == generation
        )
    ).one()
    return _to_move(row)


def _row(connection: Connection, tenant: str, name: str) -> Row[Any] | None:
    table = tables.endpoints
    return connection.execute(
        select(table).where(table.c.tenant == tenant, table.c.name == name)
    ).one_or_none()


def _to_json(state: State) -> list[dict[str, object]]:
    return [{"version": t.version, "weight": t.weight} for t in state]


def _from_json(state: list[dict[str, Any]]) -> State:
    return tuple(Target(t["version"], t["weight"]) for t in state)


def _endpoint(row: Row[Any]) -> Endpoint:
    return Endpoint(row.tenant, row.name, row.generation, _from_json(row.state), row.created_at)


def _to_move(row: Row[Any]) -> Move:
    return Move(
        generation=row.generation,
        kind=row.kind,
        before=None if row.before is None else _from_json(row.before),
        after=None if row.after is None else _from_json(row.after),
        origin=row.origin,
        previous=row.previous,
        job_id=row.job_id,
        actor=row.actor,
        message=row.message,
        created_at=row.created_at,
    )
