"""Attempts at jobs, as workers see them: a lease, a fence, and one transaction that ends the job.

An attempt's number is its fencing token. Whatever an attempt writes is written under the condition
that the job is still running that attempt; one that was superseded gets ``LeaseLost`` and leaves
nothing behind.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, insert, select, tuple_, update

from registry import audit, clock, tables
from registry.endpoints import get_endpoint
from registry.errors import (
    Conflict,
    ErrataError,
    JobFailed,
    LeaseLost,
    NotFound,
)
from registry.jobs import (
    CANCELLED,
    ENDED,
    FAILED,
    PAUSED,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    Job,
    add_event,
    announce_end,
    to_job,
)
from registry.manifests import Progress
from registry.moves import moved_since
from registry.results import Result, keep
from registry.versions import (
    Version,
    get_kept_version,
    get_ready_version,
)

#: The outcome of an attempt whose worker died, and of one whose worker was told to stop.
LOST = "lost"
RELEASED = "released"
#: The outcome of an attempt that met with what was away for the moment.
INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Claim:
    """The right to work on a job: attempt ``attempt``, from ``parent``, until the lease ends."""

    job: Job
    attempt: int
    parent: Version | None


@dataclass(frozen=True)
class Due:
    """What the queue must know of a job: not its request, which may be long."""

    id: str
    attempt: int
    dispatched_at: float | None
    created_at: float


_DUE = (
    tables.jobs.c.id,
    tables.jobs.c.attempt,
    tables.jobs.c.dispatched_at,
    tables.jobs.c.created_at,
)


def dispatchable(connection: Connection, *, limit: int = 100) -> list[Due]:
    """Queued jobs that may start: the oldest unfinished one of each endpoint, nothing before it."""
    table = tables.jobs
    earlier = table.alias("earlier")
    awaited = table.alias("awaited")
    blocked_by_earlier = (
        select(earlier.c.seq)
        .where(
            earlier.c.tenant == table.c.tenant,
            earlier.c.endpoint == table.c.endpoint,
            earlier.c.seq < table.c.seq,
            earlier.c.status.not_in(ENDED),
        )
        .exists()
    )
    blocked_by_awaited = (
        select(awaited.c.seq)
        .where(awaited.c.id == table.c.after, awaited.c.status.not_in(ENDED))
        .exists()
    )
    rows = connection.execute(
        select(*_DUE)
        .where(table.c.status == QUEUED, ~blocked_by_earlier, ~blocked_by_awaited)
        .order_by(table.c.seq)
        .limit(limit)
    )
    return [Due(*row) for row in rows]


def mark_dispatched(connection: Connection, put: Iterable[Due]) -> None:
    """Note when jobs' next attempts were put on the queue, of those that have not begun."""
    table = tables.jobs
    such = tuple_(table.c.id, table.c.attempt).in_([(job.id, job.attempt) for job in put])
    connection.execute(
        update(table).where(such, table.c.status == QUEUED).values(dispatched_at=time.time())
    )


def claim(
    connection: Connection, job_id: str, attempt: int, worker: str, lease_seconds: float
) -> Claim | None:
    """Begin an attempt; None when the delivery is stale (another attempt ran or the job ended).

    The parent of a job with an endpoint is the endpoint's head at this moment. The same worker may
    claim again, where it does not know whether its claim was committed.
    """
    now = time.time()
    jobs = tables.jobs
    claimed = connection.execute(
        update(jobs)
        .where(jobs.c.id == job_id, jobs.c.status == QUEUED, jobs.c.attempt == attempt - 1)
        .values(
            status=RUNNING,
            attempt=attempt,
            lease_until=clock.now(connection) + lease_seconds,
            started_at=now,
            message="started",
            done=0,
            total=0,
        )
    )
    if claimed.rowcount == 1:
        connection.execute(
            insert(tables.attempts).values(
                job_id=job_id, attempt=attempt, worker=worker, outcome=RUNNING, started_at=now
            )
        )
        add_event(connection, job_id, "status", {"status": RUNNING, "attempt": attempt})
    elif not _is_claimed(connection, job_id, attempt, worker):
        return None
    job = _job(connection, job_id)
    begun = Claim(job, attempt, None)
    if job.cancel_requested:
        _end(connection, begun, CANCELLED, message="cancelled")
        return None
    try:
        _check_awaited(connection, job)
        parent, generation = _parent(connection, job)
    except ErrataError as error:
        fail(connection, begun, error)
        return None
    connection.execute(
        update(jobs).where(jobs.c.id == job_id).values(claimed_generation=generation)
    )
    return Claim(_job(connection, job_id), attempt, parent)


def heartbeat(connection: Connection, claim: Claim, lease_seconds: float) -> Job:
    """Renew the lease; the job says whether its user asked to cancel or to pause.

    Raises:
        LeaseLost: another attempt took over, or the job ended.
    """
    _fenced_update(connection, claim, lease_until=clock.now(connection) + lease_seconds)
    return _job(connection, claim.job.id)


def record_progress(connection: Connection, claim: Claim, progress: Progress) -> None:
    """Write how far the work is, as the job's state and as an event.

    Raises:
        LeaseLost
    """
    _fenced_update(
        connection, claim, done=progress.done, total=progress.total, message=progress.message
    )
    add_event(connection, claim.job.id, "progress", progress.to_json())


def is_recorded(connection: Connection, claim: Claim, progress: Progress) -> bool:
    """Whether that is the last progress that was written of the job."""
    table = tables.events
    last = connection.execute(
        select(table.c.data)
        .where(table.c.job_id == claim.job.id, table.c.type == "progress")
        .order_by(table.c.seq.desc())
        .limit(1)
    ).scalar_one_or_none()
    return bool(last == progress.to_json())


def finish(connection: Connection, claim: Claim, result: Result) -> Job:
    """End the job with what it made: version, reports, status and move, in this one transaction.

    A version that fails a guard is kept as rejected and its job fails. One that was rejected or
    deleted and is brought back is what its guards say now; one that is ready stays ready. When the
    endpoint moved since the claim the version is kept and the endpoint left alone, unless the job
    asked to ``rerun``, nothing was rolled back and the endpoint has a head to run on: then the job
    is queued again. A result that is withheld leaves the endpoint alone too.

    Raises:
        LeaseLost
    """
    job = fence(connection, claim)
    moved: tuple[str, ...] = ()
    if job.endpoint is not None and job.claimed_generation is not None:
        moved = moved_since(connection, job.tenant, job.endpoint, job.claimed_generation)
    rerun = job.request.get("on_conflict") == "rerun" and "rollback" not in moved
    if moved and rerun and result.moves and _has_head(connection, job):
        return _requeue(
            connection, claim, "superseded", "endpoint moved; running again on its head"
        )
    status, told = keep(connection, job, claim.parent, result, bool(moved))
    _end(connection, claim, status, **told)
    return _job(connection, job.id)


def fail(connection: Connection, claim: Claim, error: ErrataError) -> None:
    """End the job with an error. Raises LeaseLost."""
    _end(connection, claim, FAILED, error=error.body(), message=error.message)


def cancel(connection: Connection, claim: Claim) -> None:
    """End the job as its user asked. Raises LeaseLost."""
    _end(connection, claim, CANCELLED, message="cancelled")


def pause(connection: Connection, claim: Claim) -> None:
    """Put the job down where it can go on, as its user asked. Raises LeaseLost."""
    _requeue(connection, claim, PAUSED, "paused", status=PAUSED)


def release(
    connection: Connection, job_id: str, attempt: int, max_attempts: int, outcome: str = LOST
) -> bool:
    """Give up a running attempt: queue the job again, or fail it for good.

    Args:
        max_attempts: the job fails when so many ended with their worker's death.
        outcome: LOST, or RELEASED where the worker lives and had to stop.
    """
    job = _job(connection, job_id)
    if job.status != RUNNING or job.attempt != attempt:
        return False
    error = JobFailed(
        f"job {job_id!r}: its worker died {max_attempts} times; see the worker's log, then submit"
        " it again",
        code="attempts_exhausted",
    )
    if outcome == RELEASED:
        _again(connection, job, outcome, "the worker had to stop", math.inf, error)
    else:
        _again(connection, job, outcome, "the worker died", max_attempts, error)
    return True


def interrupt(connection: Connection, claim: Claim, why: str, max_attempts: int) -> None:
    """Give up an attempt that what was away for the moment broke off: queue the job again, or fail
    it where that has happened too often.

    Raises:
        LeaseLost
    """
    job = fence(connection, claim)
    error = JobFailed(
        f"job {job.id!r}: {max_attempts} attempts were broken off, the last one by {why};"
        " mend that, then submit it again",
        code="attempts_exhausted",
    )
    _again(connection, job, INTERRUPTED, why, max_attempts, error)


def expired(connection: Connection, now: float | None = None) -> list[Due]:
    """Running jobs whose lease has ended."""
    table = tables.jobs
    moment = clock.now(connection) if now is None else now
    rows = connection.execute(
        select(*_DUE).where(table.c.status == RUNNING, table.c.lease_until < moment)
    )
    return [Due(*row) for row in rows]


def attempts(connection: Connection, job_id: str) -> list[dict[str, Any]]:
    """A job's attempts, oldest first."""
    table = tables.attempts
    rows = connection.execute(
        select(table).where(table.c.job_id == job_id).order_by(table.c.attempt)
    )
    return [
        {
            "attempt": row.attempt,
            "worker": row.worker,
            "outcome": row.outcome,
            "started_at": int(row.started_at),
            "ended_at": None if row.ended_at is None else int(row.ended_at),
        }
        for row in rows
    ]


def _parent(connection: Connection, job: Job) -> tuple[Version | None, int | None]:
    if job.endpoint is not None:
        endpoint = get_endpoint(connection, job.tenant, job.endpoint)
        return get_ready_version(connection, job.tenant, endpoint.head), endpoint.generation
    if job.parent is not None:
        find = get_kept_version if job.kind in ("evaluate", "diff") else get_ready_version
        return find(connection, job.tenant, job.parent), None
    return None, None


def _has_head(connection: Connection, job: Job) -> bool:
    """Whether an attempt at the job would find its endpoint there, and whole."""
    try:
        _parent(connection, job)
    except (NotFound, Conflict):
        return False
    return True


def _check_awaited(connection: Connection, job: Job) -> None:
    if job.after is None:
        return
    awaited = _job(connection, job.after)
    if awaited.status != SUCCEEDED:
        detail = (awaited.error or {}).get("message", "no further detail")
        raise Conflict(
            f"job {awaited.id} ({awaited.kind}), which this job needs, is {awaited.status}:"
            f" {detail}",
            code=f"{awaited.kind}_failed",
        )


def fence(connection: Connection, claim: Claim) -> Job:
    """The job, if the attempt is still the one that runs it. Raises LeaseLost."""
    job = _job(connection, claim.job.id)
    if job.status != RUNNING or job.attempt != claim.attempt:
        raise LeaseLost(
            f"attempt {claim.attempt} of job {job.id} was superseded"
            f" (the job is {job.status}, attempt {job.attempt})"
        )
    return job


def _fenced_update(connection: Connection, claim: Claim, **values: Any) -> None:
    jobs = tables.jobs
    updated = connection.execute(
        update(jobs)
        .where(
            jobs.c.id == claim.job.id,
            jobs.c.status == RUNNING,
            jobs.c.attempt == claim.attempt,
        )
        .values(**values)
    )
    if updated.rowcount != 1:
        fence(connection, claim)


def _end(connection: Connection, claim: Claim, status: str, **values: Any) -> None:
    now = time.time()
    if status == SUCCEEDED:
        values = {"message": "done", "done": tables.jobs.c.total, **values}
    values.setdefault("message", status)
    _fenced_update(connection, claim, status=status, finished_at=now, lease_until=None, **values)
    _end_attempt(connection, claim, status)
    data = {"status": status}
    data |= {key: values[key] for key in ("version_id", "error", "reason") if values.get(key)}
    add_event(connection, claim.job.id, "status", data)
    job = claim.job
    audit.record(
        connection, job.tenant, actor=job.actor, action="job.end", object=job.id, after=data
    )
    announce_end(connection, _job(connection, job.id))


def _requeue(
    connection: Connection, claim: Claim, outcome: str, message: str, status: str = QUEUED
) -> Job:
    _fenced_update(
        connection,
        claim,
        status=status,
        lease_until=None,
        dispatched_at=None,
        claimed_generation=None,
        message=message,
    )
    _end_attempt(connection, claim, outcome)
    add_event(connection, claim.job.id, "status", {"status": status, "reason": outcome})
    return _job(connection, claim.job.id)


def _again(
    connection: Connection,
    job: Job,
    outcome: str,
    why: str,
    max_attempts: float,
    error: ErrataError,
) -> None:
    """End a running attempt that came to nothing; the job runs again unless its user has asked for
    something else, or so many attempts had this outcome: then it fails with ``error``."""
    claim = Claim(job, job.attempt, None)
    if job.cancel_requested:
        cancel(connection, claim)
    elif job.pause_requested:
        pause(connection, claim)
    elif _count(connection, job.id, outcome) + 1 >= max_attempts:
        fail(connection, claim, error)
    else:
        _requeue(connection, claim, outcome, f"{why}; waiting for another attempt")


def _count(connection: Connection, job_id: str, outcome: str) -> int:
    """How many attempts at a job ended so."""
    table = tables.attempts
    such = select(func.count()).where(table.c.job_id == job_id, table.c.outcome == outcome)
    return connection.execute(such).scalar_one()


def _is_claimed(connection: Connection, job_id: str, attempt: int, worker: str) -> bool:
    """Whether this worker has begun that attempt, and it runs."""
    table = tables.attempts
    row = connection.execute(
        select(table.c.outcome).where(
            table.c.job_id == job_id, table.c.attempt == attempt, table.c.worker == worker
        )
    ).one_or_none()
    return row is not None and row.outcome == RUNNING


def _end_attempt(connection: Connection, claim: Claim, outcome: str) -> None:
    table = tables.attempts
    connection.execute(
        update(table)
        .where(table.c.job_id == claim.job.id, table.c.attempt == claim.attempt)
        .values(outcome=outcome, ended_at=time.time())
    )


def _job(connection: Connection, job_id: str) -> Job:
    """By id alone: workers serve every tenant."""
    row = connection.execute(select(tables.jobs).where(tables.jobs.c.id == job_id)).one_or_none()
    if row is None:
        raise NotFound(f"job {job_id!r} does not exist")
    return to_job(row)
