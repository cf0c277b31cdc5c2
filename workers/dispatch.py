"""The outbox and its reconciler: what SQL says is due is on the queue, whatever happens to Redis.

The jobs table is the outbox: a queued job that nothing blocks is due. ``tick`` puts due jobs on the
queue, puts them there again when the queue forgot them, and gives up attempts whose lease ended.
Every step may be repeated or done by several processes at once: an enqueue is idempotent and a
claim is a compare-and-swap.
"""

from __future__ import annotations

import logging
import math
import time

from redis import Redis
from redis.exceptions import RedisError

from registry import attempts, failpoints
from registry.attempts import Due
from registry.database import Database
from registry.errors import Unavailable
from registry.settings import Settings
from workers.delivery import enqueue, is_known, stop, workers_ready

logger = logging.getLogger("errata.dispatch")

#: After this long a job that was dispatched but not claimed is looked for on the queue, again.
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
        #: When a job that is due was last looked for on the queue, by a clock of this process.
        self._looked_for: dict[str, float] = {}

    def tick(self) -> None:
        """One pass. The queue being away is logged; the next pass makes up for it.

        Raises:
            Unavailable: the database is away.
        """
        now = time.time()
        lost, due = self._look(now)
        given_up = self._give_up(lost) if lost else []
        try:
            for job in given_up:  # a hung work-horse would keep its worker
                stop(self._redis, job.id, job.attempt)
            self._dispatch(due)
        except RedisError as error:
            logger.warning("the queue does not answer: %s", error)

    def _look(self, now: float) -> tuple[list[Due], list[Due]]:
        """Jobs whose lease ended, and those that are due.

        While the database is away no lease can be renewed: after that each gets its time again.
        """
        try:
            with self._database.read() as connection:
                lost = attempts.expired(connection)
                due = attempts.dispatchable(connection)
        except Unavailable:
            self._patient_until = float("inf")
            raise
        if self._patient_until == float("inf") or time.time() - now > self._lease / 2:
            self._patient_until = time.monotonic() + self._lease
        if time.monotonic() < self._patient_until:
            lost = []
        moment = time.monotonic()
        self._looked_for = {
            job.id: self._looked_for[job.id] for job in due if job.id in self._looked_for
        }
        return lost, [job for job in due if self._is_due(job, moment)]

    def _give_up(self, lost: list[Due]) -> list[Due]:
        """Give up the attempts of those whose lease was not renewed since they were looked at."""
        with self._database.write() as connection:
            expired = {(job.id, job.attempt) for job in attempts.expired(connection)}
            given_up = [
                job
                for job in lost
                if (job.id, job.attempt) in expired
                and attempts.release(connection, job.id, job.attempt, self._max_attempts)
            ]
        for job in given_up:
            logger.warning("%s: attempt %d's lease ended", job.id, job.attempt)
        return given_up

    def workers_ready(self) -> int:
        """Workers that can take a job. Raises RedisError when the queue does not answer."""
        return workers_ready(self._quick)

    def _is_due(self, job: Due, moment: float) -> bool:
        last = self._looked_for.get(job.id, -math.inf)
        return job.dispatched_at is None or moment - last > RECHECK_SECONDS

    def _dispatch(self, due: list[Due]) -> None:
        """Put on the queue what it does not know, and note all that in one transaction."""
        put = []
        for job in due:
            attempt = job.attempt + 1
            if job.dispatched_at is None or not is_known(self._redis, job.id, attempt):
                enqueue(self._redis, job.id, attempt)
                failpoints.reach("enqueued")
                put.append(job)
            self._looked_for[job.id] = time.monotonic()
        if put:
            with self._database.write() as connection:
                attempts.mark_dispatched(connection, put)
