"""The RQ worker: keeps one preloaded work-horse ahead of need, gives it one attempt, watches it.

RQ keeps the records; the loops are our own, so that a Redis that is away, hangs or was wiped never
ends the worker, and a death is noticed within seconds:

- the worker beats, idle or busy; what it runs expires soon after its last beat, and any worker's
  sweep then reports it as lost (workers.pulse, workers.recovery);
- a beat puts back the worker's own registration and the running attempt's record where Redis was
  wiped;
- a work-horse dies with its worker (workers.tether), so an attempt never outlives it.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from types import FrameType
from typing import Any

from redis.exceptions import RedisError
from rq import worker_registration
from rq.exceptions import StopRequested
from rq.job import Job
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.worker import Worker, WorkerStatus

from registry.database import Database
from registry.errors import InvalidRequest, Unavailable
from registry.identity import claim_store, has_identity
from registry.settings import Settings
from registry.signing import Trust, signer_of
from registry.stores import await_store, open_store
from telemetry import traces
from workers.connection import connect, wait_for_queue
from workers.delivery import (
    HANDED_OVER,
    QUEUE,
    STOP_FIELD,
    TARGET,
    WAITING,
    AttemptRecord,
    attempt_of,
    believed,
    enqueue,
    forget,
    is_known,
    put_back,
    queue_of,
    record_class,
)
from workers.pulse import Pulse, Timing
from workers.spare import Spare, WorkHorse
from workers.supervisor import describe

__all__ = ["ErrataWorker", "Timing", "enqueue", "is_known", "work"]

log = logging.getLogger(__name__)

_TURN = 0.5  # seconds after which a busy worker looks up: stop requests, its own deadline
_AWAY = 0.5  # seconds between tries while Redis is away
_SECOND_SIGNAL = 1.0  # seconds in which a second signal is an echo of the first


class ErrataWorker(Worker):
    """Takes attempts off the queue and has each performed by a work-horse of its own.

    Args:
        url: the queue's Redis.
        on_lost: called with (job id, attempt), in this process, right after an attempt's work-horse
            died or its function raised, and for attempts whose worker died. It must bear attempts
            that ended well or that the registry does not know; what it raises is logged.
        on_stopped: called so instead when the work-horse was ended because this worker stops.
        timing: heartbeats.
        environment: variables added to the work-horses' environment.
        target: the one function (dotted) that may run.
        preload: ``module:function`` that a work-horse calls ahead of need.
        grace: seconds that a running attempt gets after SIGTERM; a second signal ends it at once.
        spare_while_busy: preload the next work-horse while an attempt runs (twice the memory, no
            pause between attempts), else after it.
    """

    def __init__(
        self,
        url: str,
        *,
        on_lost: Callable[[str, int], None],
        on_stopped: Callable[[str, int], None] | None = None,
        timing: Timing | None = None,
        environment: Mapping[str, str] | None = None,
        target: str = TARGET,
        preload: str = "workers.run:preload",
        grace: float = 30.0,
        spare_while_busy: bool = True,
    ) -> None:
        timing = timing or Timing()
        connection = connect(url)
        records = record_class(target)
        super().__init__(
            [queue_of(connection, records)],
            connection=connection,
            job_class=records,
            serializer=JSONSerializer,
            worker_ttl=timing.ttl,
        )
        self._url = url
        self._records = records
        self._quick = connect(url, patience=0, timeout=3.0)
        self._on_lost = on_lost
        self._on_stopped = on_stopped or on_lost
        self._pulse = Pulse(self, self._quick, timing, self._lost)
        self._standstill = timing.standstill
        self._spare = Spare(lambda: WorkHorse(preload, target, environment or {}))
        self._spare_while_busy = spare_while_busy
        self._horse: WorkHorse | None = None
        self._grace = grace
        self._interruptible = False
        self._stop_signal_at = 0.0
        self._stop_at = float("inf")
        self._away = False

    def work(self, *args: Any, **kwargs: Any) -> bool:
        """Works until SIGTERM or SIGINT; whether any attempt was performed."""
        worked = False
        signal.signal(signal.SIGINT, self.request_stop)
        signal.signal(signal.SIGTERM, self.request_stop)
        try:
            self._spare.keep()
            with self._may_interrupt():
                self.register_birth()  # type: ignore[no-untyped-call]
            log.info("worker %s listens on the queue %s", self.name, QUEUE)
            while True:
                record = self._next()
                self.execute_job(record, self.queues[0])
                worked = True
        except StopRequested:
            log.info("worker %s stops", self.name)
        finally:
            self.teardown()
        return worked

    def _next(self) -> AttemptRecord:
        """Waits for an attempt; takes none before a work-horse is ready for it."""
        while True:
            self._try(self._pulse.keep)
            self._spare.keep()
            state = WorkerStatus.IDLE if self._spare.expected else WorkerStatus.STARTED
            with self._may_interrupt():
                if self._state != state:
                    self._state = state
                    self._pulse.hurry()
                elif not self._spare.ready:
                    self._spare.wait(_TURN)
                else:
                    record = self._take()
                    if record is not None:
                        return record

    def _take(self) -> AttemptRecord | None:
        """Takes the queue's head into the list of those handed over, waiting a second for it."""
        try:
            raw: Any = self._quick.blmove(WAITING, HANDED_OVER, timeout=1)
        except RedisError as error:
            self._note_away(error)
            time.sleep(_AWAY)
            return None
        self._away = False
        return None if raw is None else believed(self.connection, raw, self._records)

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Gives the attempt to the spare work-horse and watches it to its end."""
        execution = self.prepare_execution(job)
        horse = self._spare.take()
        order: dict[str, str | int] = {
            "url": self._url,
            "job": job.id,
            "queue": QUEUE,
            "worker": self.name,
            "execution": execution.id,
            "ttl": self.worker_ttl,
        }
        try:
            if horse is None:
                raise BrokenPipeError("no work-horse is ready")
            horse.hand(order)
        except BrokenPipeError as error:
            log.warning("attempt %s goes back to the queue: %s", job.id, error)
            if horse is not None:
                horse.close()
            put_back(self.connection, job.id, execution.id)
            return
        self._horse, self._horse_pid = horse, horse.pid
        log.info("attempt %s runs in process %d", job.id, horse.pid)
        try:
            if self._spare_while_busy:
                self._spare.keep()
            status = self._watch(job, horse)
        finally:
            self._horse, self._horse_pid = None, 0
            horse.close()
        if status != 0:
            log.error(
                "attempt %s: its work-horse %d ended with %s",
                job.id,
                horse.pid,
                describe(status),
            )
            is_stopped = time.monotonic() > self._stop_at
            self._lost(*attempt_of(job.id), self._on_stopped if is_stopped else None)
        self._try(lambda: forget(self._quick, job.id, execution.id))
        self.execution = None

    def _watch(self, record: Job, horse: WorkHorse) -> int:
        """Beats until the work-horse ends; its exit status."""
        moved = time.monotonic()
        while (status := horse.wait(_TURN)) is None:
            if not horse.stands_still:
                moved = time.monotonic()
            elif time.monotonic() - moved > self._standstill:
                log.warning("attempt %s stands still and is killed", record.id)
                horse.kill()
            if time.monotonic() > self._stop_at:
                log.warning("attempt %s did not end in %g s and is killed", record.id, self._grace)
                horse.kill()
            self._try(lambda: self._obey_stop(record, horse))
            self._try(lambda: self._pulse.keep(record))
        return status

    def _obey_stop(self, record: Job, horse: WorkHorse) -> None:
        if self._quick.hget(record.key, STOP_FIELD):
            log.warning("attempt %s is killed: its stop was requested", record.id)
            horse.kill()

    def _lost(
        self, job_id: str, attempt: int, told: Callable[[str, int], None] | None = None
    ) -> None:
        try:
            (told or self._on_lost)(job_id, attempt)
        except Exception:  # the hook's trouble must not end the worker; the lease runs out anyway
            log.exception("job %s, attempt %d was lost and could not be reported", job_id, attempt)

    def get_heartbeat_ttl(self, job: Job) -> int:
        """The worker's own, not RQ's minute more."""
        return int(self.worker_ttl)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except RedisError as error:
            self._note_away(error)

    def _note_away(self, error: RedisError) -> None:
        if not self._away:
            log.warning("worker %s: Redis is away: %s", self.name, error)
        self._away = True

    @contextlib.contextmanager
    def _may_interrupt(self) -> Iterator[None]:
        """Where a signal may break off what runs."""
        self._interruptible = True
        try:
            if self._stop_requested:
                raise StopRequested
            yield
        finally:
            self._interruptible = False

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """The first signal ends an idle worker and gives an attempt its grace; a second ends it."""
        if not self._stop_requested:
            self._stop_requested = True
            self._stop_signal_at = time.monotonic()
            self._stop_at = self._stop_signal_at + self._grace
            if self._interruptible:
                self._interruptible = False
                raise StopRequested
        elif time.monotonic() - self._stop_signal_at > _SECOND_SIGNAL:
            self._stop_at = 0.0
            if self._horse is not None:
                self._horse.kill()

    def teardown(self) -> None:
        """Ends the work-horses, and the registration if Redis answers."""
        self._spare.close()
        with contextlib.suppress(RedisError), self._quick.pipeline() as pipeline:
            worker_registration.unregister(self, pipeline)
            pipeline.delete(self.key)
            pipeline.execute()
        self._quick.close()
        self.connection.close()


def work(settings: Settings) -> None:
    """Runs a worker until SIGTERM: the ``errata worker`` command.

    Raises:
        Unavailable: no queue is configured, or it, the database or the object store does not
            answer.
        InvalidRequest: one of them does not let this service in, the keys of signatures cannot be
            used, or traces are asked for that cannot be made.
        Conflict: the artifacts are another registry's.
    """
    if (problem := traces.problem()) is not None:
        raise InvalidRequest(problem)
    if not settings.redis_url:
        raise Unavailable("a worker needs a queue: set REDIS_URL to the URL of its Redis or Valkey")
    settings.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    signer_of(settings)
    with contextlib.closing(Database(settings.sql_url, Trust.of(settings))) as database:
        database.wait(settings.wait_seconds)
        await_store(settings)
        with database.read() as connection:
            is_made = has_identity(connection)
        if is_made:  # else by `errata serve`, which claims the store then
            claim_store(database, open_store(settings))
    wait_for_queue(settings.redis_url, settings.wait_seconds)
    try:
        run = import_module("workers.run")
        worker = ErrataWorker(
            settings.redis_url,
            on_lost=run.lost,
            on_stopped=run.released,
            grace=settings.stop_seconds,
            timing=Timing.for_lease(settings.lease_seconds),
            environment=settings.environment(),
        )
        worker.work()
    except RedisError as error:
        raise Unavailable(f"the queue at REDIS_URL does not answer: {error}") from error
