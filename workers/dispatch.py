"""The outbox and its reconciler: what SQL says is due is on the queue, whatever happens to Redis.

The jobs table is the outbox: a queued job that nothing blocks is due. ``tick`` puts due jobs on the
queue, puts them there again when the queue forgot them, and gives up attempts whose lease ended.
Every step may be repeated or done by several processes at once: an enqueue is idempotent and a
claim is a compare-and-swap.
"""

from __future__ import annotations

import logging
import time

from redis import Redis
from redis.exceptions import RedisError

from registry import attempts
from registry.database import Database
from registry.jobs import Job
from registry.settings import Settings
from workers.delivery import enqueue, is_known, stop, workers_ready

logger = logging.getLogger("errata.dispatch")

#: After this long a job that was dispatched but not claimed is looked for on the queue.
RECHECK_SECONDS = 2.0


class Dispatcher:
    """Moves due jobs from SQL to the queue."""

    def __init__(self, database: Database, redis: Redis, settings: Settings) -> None:
        self._database = database
        self._redis = redis
        self._max_attempts = settings.max_attempts

    def tick(self) -> None:
        """One pass. The queue being away is logged; the next pass makes up for it."""
        now = time.time()
        with self._database.read() as connection:
            lost = attempts.expired(connection, now)
            due = [job for job in attempts.dispatchable(connection) if self._is_due(job, now)]
        if lost:
            with self._database.write() as connection:
                for job in lost:
                    if attempts.release(connection, job.id, job.attempt, self._max_attempts):
                        logger.warning("%s: attempt %d's lease ended", job.id, job.attempt)
        try:
            for job in lost:  # a work-horse that hangs would keep its worker from the next attempt
                stop(self._redis, job.id, job.attempt)
            for job in due:
                self._dispatch(job)
        except RedisError as error:
            logger.warning("the queue does not answer: %s", error)

    def workers_ready(self) -> int:
        """Workers that can take a job; 0 when the queue does not answer."""
        try:
            return workers_ready(self._redis)
        except RedisError:
            return 0

    @staticmethod
    def _is_due(job: Job, now: float) -> bool:
        return job.dispatched_at is None or now - job.dispatched_at > RECHECK_SECONDS

    def _dispatch(self, job: Job) -> None:
        attempt = job.attempt + 1
        if job.dispatched_at is None or not is_known(self._redis, job.id, attempt):
            enqueue(self._redis, job.id, attempt)
        with self._database.write() as connection:
            attempts.mark_dispatched(connection, job.id, attempt)
