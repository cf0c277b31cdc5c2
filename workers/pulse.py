"""A worker's heartbeat: what says that it lives, and notices that others do not."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import redis
from rq import worker_registration
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.utils import now, utcformat
from rq.worker import BaseWorker

from workers.delivery import queue_of
from workers.recovery import Recovery

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timing:
    """How soon a death is noticed, in seconds.

    Args:
        ttl: an execution counts as lost this long after its worker's last beat.
        beat: between two beats.
        sweep: between two looks for lost executions.
        standstill: a work-horse that is stopped for so long is killed: it may hold a lock that
            everybody waits for.
    """

    ttl: int = 10
    beat: float = 3.0
    sweep: float = 3.0
    standstill: float = 30.0

    @classmethod
    def for_lease(cls, seconds: float) -> Timing:
        """The default timing, scaled down for leases under 15 s."""
        scale = min(1.0, seconds / 15.0)
        return cls(
            ttl=max(3, round(10 * scale)),
            beat=3.0 * scale,
            sweep=3.0 * scale,
            standstill=30.0 * scale,
        )


class Pulse:
    """Beats for a worker and for what it runs, and sweeps after workers that stopped beating.

    Args:
        worker: the worker; its state and its execution go with each beat.
        connection: a client that gives up at once, so that a Redis that is away holds up nothing.
        timing: how often.
        on_lost: called with (job id, attempt) where another worker died.
    """

    def __init__(
        self,
        worker: BaseWorker,
        connection: redis.Redis,
        timing: Timing,
        on_lost: Callable[[str, int], None],
    ) -> None:
        self._worker = worker
        self._connection = connection
        self._timing = timing
        self._on_lost = on_lost
        self._recovery = Recovery(connection, patience=2 * timing.sweep)
        self._queue = queue_of(connection)
        self._last = time.monotonic()
        self._beat_due = 0.0
        self._sweep_due = self._last + 2 * timing.beat  # the others may just be coming back

    def hurry(self) -> None:
        """Makes the next beat due now: the worker's state has changed."""
        self._beat_due = 0.0

    def keep(self, record: Job | None = None) -> None:
        """Beats and sweeps where due; RedisError where Redis is away."""
        if time.monotonic() >= self._beat_due:
            self._beat(record)
        if time.monotonic() >= self._sweep_due:
            self._sweep_due = time.monotonic() + self._timing.sweep
            worker_registration.clean_worker_registry(self._queue)
            for job_id, attempt in self._recovery.sweep():
                log.error("job %s, attempt %d: its worker died", job_id, attempt)
                self._on_lost(job_id, attempt)

    def _beat(self, record: Job | None) -> None:
        """Says that the worker lives, and what it runs; puts back what Redis has lost of it."""
        worker = self._worker
        worker.last_heartbeat = now()
        beat_at = utcformat(worker.last_heartbeat)
        life: dict[Any, Any] = {"last_heartbeat": beat_at, "state": worker.get_state()}
        with self._connection.pipeline() as pipeline:
            pipeline.hexists(worker.key, "birth")
            pipeline.hset(worker.key, mapping=life)
            pipeline.expire(worker.key, self._timing.ttl)
            if record is not None and worker.execution is not None:
                pipeline.hexists(record.key, "data")
                pipeline.hset(record.key, "last_heartbeat", beat_at)
                worker.execution.heartbeat(
                    record.started_job_registry, self._timing.ttl, pipeline=pipeline
                )
            registered, _, _, *recorded = pipeline.execute()
        if not registered:
            self._register_again(life)
        if record is not None and worker.execution is not None and not recorded[0]:
            self._record_again(record, worker.execution)
        at = time.monotonic()
        if at - self._last > self._timing.ttl / 2:  # others were cut off too: let them beat first
            self._sweep_due = at + self._timing.ttl
        self._last, self._beat_due = at, at + self._timing.beat

    def _register_again(self, life: dict[Any, Any]) -> None:
        log.warning("worker %s is unknown to Redis and registers again", self._worker.name)
        with self._connection.pipeline() as pipeline:
            pipeline.hset(self._worker.key, mapping={**self._worker.serialize(), **life})
            pipeline.expire(self._worker.key, self._timing.ttl)
            worker_registration.register(self._worker, pipeline)
            pipeline.execute()

    def _record_again(self, record: Job, execution: Execution) -> None:
        log.warning("attempt %s is unknown to Redis and is recorded again", record.id)
        ttl = self._timing.ttl
        with self._connection.pipeline() as pipeline:
            record.set_status(JobStatus.STARTED, pipeline=pipeline)
            record.save(pipeline=pipeline)
            execution.save(ttl, pipeline)
            record.started_job_registry.add_execution(execution, pipeline, ttl)
            pipeline.execute()
