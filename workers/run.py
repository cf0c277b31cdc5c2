"""What a work-horse runs, and what its worker is told when it dies."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection

from registry import attempts, failpoints
from registry.bases import find_bases
from registry.database import Database
from registry.errors import ErrataError, JobFailed, LeaseLost, NotFound
from registry.jobs import Job
from registry.momentary import passes, reason
from registry.renewal import renew
from registry.results import Result
from registry.settings import Settings
from registry.signing import Trust, signer_of
from registry.stores import open_store
from telemetry import traces
from telemetry.context import bound
from telemetry.logs import describe
from workers.notices import Notices

if TYPE_CHECKING:
    from workers.work import LoadedBases, Work

logger = logging.getLogger("errata.run")

#: Seconds that the end of an attempt, or its beginning, waits for a database that is away.
PATIENCE = 300.0
#: Most seconds that an attempt which was broken off waits, its lease kept, before the next begins.
LONGEST_REST = 30.0

#: The module that performs each kind of job.
KINDS = {
    "diff": "workers.kinds.diff",
    "edit": "workers.kinds.edit",
    "evaluate": "workers.kinds.evaluate",
    "export": "workers.kinds.export",
    "fine_tune": "workers.kinds.fine_tune",
    "flatten": "workers.kinds.flatten",
    "import": "workers.kinds.importing",
    "merge": "workers.kinds.merge",
    "merge_preview": "workers.kinds.merge_preview",
    "prepare": "workers.kinds.prepare",
    "preview": "workers.kinds.preview",
    "replay": "workers.kinds.replay",
    "revert": "workers.kinds.revert",
}


def preload() -> None:
    """Import what is heavy and load the bases, before the work-horse says that it is ready.

    What those before it left half written when they died goes: a machine that only works has no
    collector that would delete it.
    """
    _clear()
    _bases().preload()
    for module in KINDS.values():
        import_module(module)


def run(job_id: str, attempt: int) -> None:
    """Perform one attempt of a job, in a work-horse. A stale delivery ends at once."""
    with bound(job_id=job_id, attempt=attempt):
        try:
            _run(job_id, attempt)
        except Exception:
            logger.exception("attempt %d could not be performed", attempt)
            raise
        finally:
            traces.flush()


def _run(job_id: str, attempt: int) -> None:
    settings = Settings()
    database = Database(settings.sql_url, Trust.of(settings), signer_of(settings))
    begun = time.time()
    claimed = partial(
        attempts.claim,
        job_id=job_id,
        attempt=attempt,
        worker=_name(),
        lease_seconds=settings.lease_seconds,
    )
    claim = database.insist(claimed, PATIENCE)
    if claim is None:
        logger.info("attempt %d is not due", attempt)
        return
    failpoints.reach("claimed")
    job = claim.job
    told: dict[str, str | int | float] = {
        "errata.job": job.id,
        "errata.attempt": attempt,
        "errata.kind": job.kind,
    }
    with traces.continued(job.carried, f"job {job.kind}", begun=begun, attributes=told):
        traces.record("claim", begun, time.time())
        logger.info("attempt %d at a job of kind %s begins", attempt, job.kind)
        _perform(claim, settings, database)
        logger.info("attempt %d ends after %.1f s", attempt, time.time() - begun)


def _perform(claim: attempts.Claim, settings: Settings, database: Database) -> None:
    work_module: Any = import_module("workers.work")
    artifacts = open_store(settings)
    try:
        with work_module.Work(claim, settings, database, artifacts, _bases()) as work:
            try:
                result = import_module(KINDS[claim.job.kind]).perform(work)
                failpoints.reach("made")
                renew(artifacts, claim, result, settings.gc_grace_seconds)
                with traces.span("commit"):
                    ended = database.insist(partial(_finish, claim=claim, result=result), PATIENCE)
                failpoints.reach("finished")
                if ended.activated:
                    Notices(settings.redis_url).publish()
            except LeaseLost:
                raise
            except Exception as error:
                database.insist(_ending(work, error), PATIENCE)
    except LeaseLost as error:
        logger.warning("%s", error.message)


def lost(job_id: str, attempt: int) -> None:
    """The worker says that an attempt's work-horse died: the job may run again at once."""
    _release(job_id, attempt, attempts.LOST)


def released(job_id: str, attempt: int) -> None:
    """The worker says that it ended an attempt's work-horse because it stops itself."""
    _release(job_id, attempt, attempts.RELEASED)


def _release(job_id: str, attempt: int, outcome: str) -> None:
    settings = Settings()
    database = Database(settings.sql_url)
    try:
        with database.write() as connection:
            attempts.release(connection, job_id, attempt, settings.max_attempts, outcome)
    except NotFound:
        logger.warning("%s: the queue named a job that the registry does not know", job_id)
    finally:
        database.close()


def _finish(connection: Connection, claim: attempts.Claim, result: Result) -> Job:
    ended = attempts.finish(connection, claim, result)
    failpoints.reach("finish-commit")
    return ended


def _ending(work: Work, error: Exception) -> Callable[[Connection], object]:
    """What an attempt that raised ``error`` writes of its end."""
    work_module: Any = import_module("workers.work")
    claim = work.claim
    if isinstance(error, work_module.Cancelled):
        return partial(attempts.cancel, claim=claim)
    if isinstance(error, work_module.Paused):
        return partial(attempts.pause, claim=claim)
    if passes(error):
        why = reason(error)
        logger.warning("%s: attempt %d is broken off: %s", claim.job.id, claim.attempt, why)
        work.rest(min(2.0**claim.attempt, LONGEST_REST))
        most = work.settings.max_attempts
        return partial(attempts.interrupt, claim=claim, why=why, max_attempts=most)
    if isinstance(error, ErrataError):
        return partial(attempts.fail, claim=claim, error=error)
    logger.error("%s: attempt %d failed", claim.job.id, claim.attempt, exc_info=error)
    return partial(attempts.fail, claim=claim, error=_unexpected(error))


def _unexpected(error: Exception) -> JobFailed:
    return JobFailed(
        f"the job failed unexpectedly: {type(error).__name__}: {error}; the worker's log holds the"
        " traceback",
        code="internal_error",
    )


def _clear() -> None:
    settings = Settings()
    try:
        open_store(settings).clear(time.time() - settings.gc_grace_seconds)
    except OSError as error:
        logger.warning("what dead processes left half written stays: %s", describe(error))


@cache
def _bases() -> LoadedBases:
    settings = Settings()
    torch: Any = import_module("torch")
    torch.set_num_threads(settings.worker_threads)
    loaded: LoadedBases = import_module("workers.work").LoadedBases(
        find_bases(settings.bases), settings.dtype, settings.device
    )
    return loaded


def _name() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"
