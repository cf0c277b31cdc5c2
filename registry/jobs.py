"""Jobs as users see them: submitted once, in order on their endpoint, ended once."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, and_, func, insert, or_, select, update

from registry import audit, tables, webhooks
from registry.errors import Conflict, NotFound, TooManyRequests, UnprocessableRequest
from registry.pages import Page, newest_first
from telemetry import context, traces

QUEUED, RUNNING, PAUSED = "queued", "running", "paused"
SUCCEEDED, FAILED, CANCELLED = "succeeded", "failed", "cancelled"
ENDED = (SUCCEEDED, FAILED, CANCELLED)
UNFINISHED = (QUEUED, RUNNING, PAUSED)
IDEMPOTENCY_SECONDS = 24 * 3600
#: After so many seconds it is worth asking again whether a full queue has room.
FULL_SECONDS = 10
#: In a job's request as it is stored, what was carried on from the HTTP request that posted it.
_CARRIED = "_carried"


@dataclass(frozen=True)
class Job:
    """A row of the jobs table.

    Attributes:
        carried: the trace and the id of the request that posted it, as far as there are any.
    """

    seq: int
    id: str
    tenant: str
    kind: str
    base: str
    endpoint: str | None
    parent: str | None
    after: str | None
    request: Mapping[str, Any]
    actor: str
    status: str
    done: int
    total: int
    message: str
    attempt: int
    lease_until: float | None
    dispatched_at: float | None
    claimed_generation: int | None
    cancel_requested: bool
    pause_requested: bool
    version_id: str | None
    activated: bool
    reason: str | None
    metrics: Mapping[str, Any] | None
    guards: list[Mapping[str, Any]] | None
    error: Mapping[str, Any] | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    carried: Mapping[str, str] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        return self.status in ENDED


@dataclass(frozen=True)
class Event:
    """Something that happened to a job; ``seq`` orders the events of the whole service."""

    seq: int
    type: str  # status, progress or message
    data: Mapping[str, Any]
    created_at: float


def submit_job(
    connection: Connection,
    tenant: str,
    kind: str,
    *,
    base: str,
    request: Mapping[str, Any],
    actor: str,
    endpoint: str | None = None,
    parent: str | None = None,
    after: str | None = None,
) -> Job:
    """Write a job; it is acknowledged once the transaction commits."""
    job_id = "job_" + secrets.token_hex(16)
    carried = traces.carrier(context.fields())
    connection.execute(
        insert(tables.jobs).values(
            id=job_id,
            tenant=tenant,
            kind=kind,
            base=base,
            endpoint=endpoint,
            parent=parent,
            after=after,
            request={**request, _CARRIED: carried} if carried else dict(request),
            actor=actor,
            status=QUEUED,
            done=0,
            total=0,
            message="waiting for a worker",
            attempt=0,
            cancel_requested=False,
            pause_requested=False,
            activated=False,
            created_at=time.time(),
        )
    )
    add_event(connection, job_id, "status", {"status": QUEUED})
    told = {"kind": kind, "base": base, "endpoint": endpoint, "parent": parent}
    audit.record(connection, tenant, actor=actor, action="job.submit", object=job_id, after=told)
    return get_job(connection, tenant, job_id)


def check_room(connection: Connection, tenant: str, most_of_tenant: int, most: int) -> None:
    """Look whether one more job may be submitted, in the transaction that submits it.

    Raises:
        TooManyRequests: so many are unfinished already, of the tenant or altogether.
    """
    table = tables.jobs
    unfinished = select(func.count()).where(table.c.status.in_(UNFINISHED))
    for query, limit, whose, setting in (
        (unfinished.where(table.c.tenant == tenant), most_of_tenant, "you have", "TENANT_JOBS"),
        (unfinished, most, "there are", "JOBS"),
    ):
        if connection.execute(query).scalar_one() >= limit:
            raise TooManyRequests(
                f"{whose} {limit} unfinished jobs, the most allowed (ERRATA_MAX_{setting}); wait"
                " until some have ended, or cancel some",
                code="queue_full",
                retry_after=FULL_SECONDS,
            )


def find_idempotent(connection: Connection, tenant: str, key: str, body_digest: str) -> Job | None:
    """The job that this Idempotency-Key already made, if any.

    Raises:
        UnprocessableRequest: the key was used with another body.
    """
    table = tables.idempotency_keys
    row = connection.execute(
        select(table).where(table.c.tenant == tenant, table.c.key == key)
    ).one_or_none()
    if row is None or row.created_at < time.time() - IDEMPOTENCY_SECONDS:
        return None
    if row.body_digest != body_digest:
        raise UnprocessableRequest(
            f"Idempotency-Key {key!r} was used with another request in the last 24 h;"
            " take a new key for a new request",
            code="idempotency_key_reused",
        )
    return get_job(connection, tenant, row.job_id)


def remember_idempotent(
    connection: Connection, tenant: str, key: str, body_digest: str, job_id: str
) -> None:
    table = tables.idempotency_keys
    connection.execute(
        table.delete().where(
            or_(
                and_(table.c.tenant == tenant, table.c.key == key),
                table.c.created_at < time.time() - IDEMPOTENCY_SECONDS,
            )
        )
    )
    connection.execute(
        insert(table).values(
            tenant=tenant,
            key=key,
            body_digest=body_digest,
            job_id=job_id,
            created_at=time.time(),
        )
    )


def get_job(connection: Connection, tenant: str, job_id: str) -> Job:
    row = connection.execute(
        select(tables.jobs).where(tables.jobs.c.tenant == tenant, tables.jobs.c.id == job_id)
    ).one_or_none()
    if row is None:
        raise NotFound(
            f"job {job_id!r} does not exist; GET /v1/jobs lists those that do",
            code="job_not_found",
        )
    return to_job(row)


def list_jobs(
    connection: Connection,
    tenant: str,
    *,
    kind: str | None = None,
    status: str | None = None,
    endpoint: str | None = None,
    after: str | None = None,
    limit: int = 20,
) -> Page[Job]:
    """Newest first."""
    table = tables.jobs
    query = select(table).where(table.c.tenant == tenant)
    for column, value in ((table.c.kind, kind), (table.c.status, status)):
        query = query if value is None else query.where(column == value)
    if endpoint is not None:
        query = query.where(table.c.endpoint == endpoint)
    before = None if after is None else get_job(connection, tenant, after).seq
    return newest_first(connection, query, table.c.seq, to_job, before=before, limit=limit)


def position(connection: Connection, job: Job) -> int | None:
    """How many unfinished jobs stand before a queued one."""
    if job.status != QUEUED:
        return None
    table = tables.jobs
    before = select(func.count()).where(table.c.seq < job.seq, table.c.status.not_in(ENDED))
    return connection.execute(before).scalar_one()


def cancel_job(connection: Connection, tenant: str, job_id: str, *, actor: str) -> Job:
    """Cancel a queued job at once, ask a running one to stop.

    Raises:
        Conflict: the job has ended.
    """
    job = get_job(connection, tenant, job_id)
    if job.ended:
        raise Conflict(
            f"job {job_id!r} has ended ({job.status}) and cannot be cancelled", code="job_ended"
        )
    _audit(connection, job, "cancel", actor)
    values: dict[str, Any] = {"cancel_requested": True}
    if job.status != RUNNING:
        values |= {"status": CANCELLED, "finished_at": time.time(), "message": "cancelled"}
        add_event(connection, job_id, "status", {"status": CANCELLED})
    connection.execute(update(tables.jobs).where(tables.jobs.c.id == job_id).values(**values))
    job = get_job(connection, tenant, job_id)
    if job.ended:
        announce_end(connection, job)
    return job


def pause_job(connection: Connection, tenant: str, job_id: str, *, actor: str) -> Job:
    """Pause a queued job at once, ask a running one to stop where it can go on.

    Raises:
        Conflict: the job has ended.
    """
    job = get_job(connection, tenant, job_id)
    if job.ended:
        raise Conflict(
            f"job {job_id!r} has ended ({job.status}) and cannot be paused", code="job_ended"
        )
    if job.status == PAUSED:
        return job
    _audit(connection, job, "pause", actor)
    values: dict[str, Any] = {"pause_requested": True}
    if job.status == QUEUED:
        values |= {"status": PAUSED, "message": "paused"}
        add_event(connection, job_id, "status", {"status": PAUSED})
    connection.execute(update(tables.jobs).where(tables.jobs.c.id == job_id).values(**values))
    return get_job(connection, tenant, job_id)


def resume_job(connection: Connection, tenant: str, job_id: str, *, actor: str) -> Job:
    """Queue a paused job again.

    Raises:
        Conflict: the job is not paused.
    """
    job = get_job(connection, tenant, job_id)
    if job.status != PAUSED:
        raise Conflict(
            f"job {job_id!r} is {job.status}; only a paused one can be resumed",
            code="job_not_paused",
        )
    connection.execute(
        update(tables.jobs)
        .where(tables.jobs.c.id == job_id)
        .values(
            status=QUEUED, pause_requested=False, dispatched_at=None, message="waiting for a worker"
        )
    )
    _audit(connection, job, "resume", actor)
    add_event(connection, job_id, "status", {"status": QUEUED, "reason": "resumed"})
    return get_job(connection, tenant, job_id)


def _audit(connection: Connection, job: Job, asked: str, actor: str) -> None:
    before = {"status": job.status}
    audit.record(
        connection, job.tenant, actor=actor, action=f"job.{asked}", object=job.id, before=before
    )


def unfinished_like(
    connection: Connection, tenant: str, kind: str, base: str, names: set[str]
) -> Job | None:
    """A tenant's job of that kind on that base whose request covers ``names``, and that is to be
    done: what waits for it ends with it, so another tenant's does not count."""
    table = tables.jobs
    rows = connection.execute(
        select(table).where(
            table.c.tenant == tenant,
            table.c.kind == kind,
            table.c.base == base,
            table.c.status.not_in(ENDED),
            table.c.cancel_requested.is_(False),
        )
    )
    for row in rows:
        if names <= set(row.request.get("resources", ())):
            return to_job(row)
    return None


def latest_of(
    connection: Connection, tenant: str, kind: str, parent: str, request: Mapping[str, Any]
) -> Job | None:
    """The newest job of that kind on a parent that was asked for in the same words."""
    table = tables.jobs
    rows = connection.execute(
        select(table)
        .where(table.c.tenant == tenant, table.c.kind == kind, table.c.parent == parent)
        .order_by(table.c.seq.desc())
    )
    return next((job for job in map(to_job, rows) if job.request == dict(request)), None)


def announce_end(connection: Connection, job: Job) -> None:
    """Have the tenant's webhooks told that a job has ended, and how."""
    told = {
        "id": job.id,
        "kind": job.kind,
        "status": job.status,
        "base": job.base,
        "endpoint": job.endpoint,
        "version": job.version_id,
        "activated": job.activated,
        "reason": job.reason,
        "error": job.error,
    }
    webhooks.announce(connection, job.tenant, f"job.{job.status}", told)


def add_event(connection: Connection, job_id: str, kind: str, data: Mapping[str, Any]) -> None:
    connection.execute(
        insert(tables.events).values(
            job_id=job_id, type=kind, data=dict(data), created_at=time.time()
        )
    )


def events(connection: Connection, job_id: str, *, after: int = 0, limit: int = 500) -> list[Event]:
    """A job's events with ``seq > after``, oldest first."""
    table = tables.events
    rows = connection.execute(
        select(table)
        .where(table.c.job_id == job_id, table.c.seq > after)
        .order_by(table.c.seq)
        .limit(limit)
    )
    return [to_event(row) for row in rows]


def all_events(connection: Connection, job_id: str) -> Iterator[Event]:
    """A job's events, oldest first."""
    after = 0
    while page := events(connection, job_id, after=after):
        yield from page
        after = page[-1].seq


def latest_events(
    connection: Connection, job_id: str, *, before: int | None = None, limit: int = 20
) -> Page[Event]:
    """A job's events with ``seq < before``, newest first."""
    table = tables.events
    query = select(table).where(table.c.job_id == job_id)
    return newest_first(connection, query, table.c.seq, to_event, before=before, limit=limit)


def to_event(row: Row[Any]) -> Event:
    return Event(row.seq, row.type, row.data, row.created_at)


def to_job(row: Row[Any]) -> Job:
    request = dict(row.request)
    carried = request.pop(_CARRIED, {})
    return Job(**{**row._mapping, "request": request, "carried": carried})
