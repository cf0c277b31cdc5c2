"""What a work-horse runs, and what its worker is told when it dies."""

from __future__ import annotations

import logging
import os
import socket
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from registry import attempts
from registry.artifacts import ArtifactStore
from registry.bases import find_bases
from registry.database import Database
from registry.errors import ErrataError, JobFailed, LeaseLost, NotFound
from registry.settings import Settings
from workers.notices import Notices

if TYPE_CHECKING:
    from workers.work import LoadedBases

logger = logging.getLogger("errata.run")

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
    """Import what is heavy and load the bases, before the work-horse says that it is ready."""
    _bases().preload()
    for module in KINDS.values():
        import_module(module)


def run(job_id: str, attempt: int) -> None:
    """Perform one attempt of a job, in a work-horse. A stale delivery ends at once."""
    settings = Settings()
    database = Database(settings.sql_url)
    with database.write() as connection:
        claim = attempts.claim(connection, job_id, attempt, _name(), settings.lease_seconds)
    if claim is None:
        logger.info("%s: attempt %d is not due", job_id, attempt)
        return
    work_module: Any = import_module("workers.work")
    artifacts = ArtifactStore(settings.artifact_folder)
    try:
        try:
            with work_module.Work(claim, settings, database, artifacts, _bases()) as work:
                result = import_module(KINDS[claim.job.kind]).perform(work)
                with database.write() as connection:
                    ended = attempts.finish(connection, claim, result)
                if ended.activated:
                    Notices(settings.redis_url).publish()
        except work_module.Cancelled:
            with database.write() as connection:
                attempts.cancel(connection, claim)
        except work_module.Paused:
            with database.write() as connection:
                attempts.pause(connection, claim)
        except LeaseLost:
            raise
        except ErrataError as error:
            _fail(database, claim, error)
        except Exception as error:
            logger.exception("%s: attempt %d failed", job_id, attempt)
            _fail(database, claim, _unexpected(error))
    except LeaseLost as error:
        logger.warning("%s", error.message)


def lost(job_id: str, attempt: int) -> None:
    """The worker says that an attempt's work-horse died: the job may run again at once."""
    settings = Settings()
    database = Database(settings.sql_url)
    try:
        with database.write() as connection:
            attempts.release(connection, job_id, attempt, settings.max_attempts)
    except NotFound:
        logger.warning("%s: the queue named a job that the registry does not know", job_id)
    finally:
        database.close()


def _fail(database: Database, claim: attempts.Claim, error: ErrataError) -> None:
    with database.write() as connection:
        attempts.fail(connection, claim, error)


def _unexpected(error: Exception) -> JobFailed:
    return JobFailed(
        f"the job failed unexpectedly: {type(error).__name__}: {error}; the worker's log holds the"
        " traceback",
        code="internal_error",
    )


@cache
def _bases() -> LoadedBases:
    settings = Settings()
    torch: Any = import_module("torch")
    torch.set_num_threads(settings.worker_threads)
    loaded: LoadedBases = import_module("workers.work").LoadedBases(
        find_bases(settings.bases), settings.dtype
    )
    return loaded


def _name() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"
