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

from registry import attempts, failpoints
from registry.database import Database
from registry.errors import Unavailable
from registry.jobs import Job
from registry.settings import Settings
from workers.delivery import enqueue, is_known, stop, workers_ready

logger = logging.getLogger("errata.dispatch")

#: After this long a job that was dispatched but not claimed is looked for on the queue.
RECHECK_SECONDS = 2.0


class Dispatcher:
    """Moves due jobs from SQL to the queue.

    Args:
        redis: waits for a queue that is away.
        quick: does not, for who only wants to know.
    """

    def __init__(
        self, database: Database, redis: Redis, settings: Settings, *, quick: Redis
    ) -> None:
        self._database = database
        self._redis = redis
        self._quick = quick
        self._max_attempts = settings.max_attempts
        self._lease = settings.lease_seconds
        self._patient_until = 0.0

    def tick(self) -> None:
        """One pass. The queue being away is logged; the next pass makes up for it.

        Raises:
            Unavailable: the database is away.
        """
        now = time.time()
        lost, due = self._look(now)
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

    def _look(self, now: float) -> tuple[list[Job], list[Job]]:
        """Jobs whose lease ended, and those that are due.

        While the database is away no lease can be renewed: after that each gets its time again.
        """
        try:
            with self._database.read() as connection:
                lost = attempts.expired(connection, now)
                due = attempts.dispatchable(connection)
        except Unavailable:
            self._patient_until = float("inf")
            raise
        if self._patient_until == float("inf") or time.time() - now > self._lease / 2:
            self._patient_until = time.monotonic() + self._lease
        if time.monotonic() < self._patient_until:
            lost = []
        return lost, [job for job in due if self._is_due(job, now)]

    def workers_ready(self) -> int:
        """Workers that can take a job. Raises RedisError when the queue does not answer."""
        return workers_ready(self._quick)

    @staticmethod
    def _is_due(job: Job, now: float) -> bool:
        return job.dispatched_at is None or now - job.dispatched_at > RECHECK_SECONDS

    def _dispatch(self, job: Job) -> None:
        attempt = job.attempt + 1
        if job.dispatched_at is None or not is_known(self._redis, job.id, attempt):
            enqueue(self._redis, job.id, attempt)
            failpoints.reach("enqueued")
        with self._database.write() as connection:
            attempts.mark_dispatched(connection, job.id, attempt)
