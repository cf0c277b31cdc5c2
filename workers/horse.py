"""The work-horse: ``python -m workers.horse <parent pid> <ready fd> <preload> <target>``.

A fresh interpreter that its worker starts ahead of need (a fork of a process that has used torch
hangs, and CUDA cannot be forked). It preloads, says ``ready``, takes one line of JSON from stdin,
performs that one attempt with RQ's machinery and ends: 0 when the function returned, 70 when it
raised. It dies with its worker.
"""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from rq.exceptions import NoSuchJobError
from rq.executions import Execution
from rq.job import Job
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.worker import Worker

from registry.settings import Settings
from telemetry import logs, traces
from workers.connection import connect
from workers.delivery import QUEUE, NoDeathPenalty, forget, queue_of, record_class
from workers.spare import READY
from workers.tether import tie_to_parent

log = logging.getLogger(__name__)

RAISED = 70  # os.EX_SOFTWARE: the function raised
#: Files that may be open at once, where the system allows more than it gives: each artifact that is
#: in use is one.
_MOST_FILES = 65536


class Performer(Worker):
    """The work-horse's half of an RQ worker: performs one job and leaves nothing of it in Redis."""

    death_penalty_class = NoDeathPenalty
    log_result_lifespan = False

    def get_heartbeat_ttl(self, job: Job) -> int:
        """The worker's own, not RQ's minute more."""
        return int(self.worker_ttl)

    def main_work_horse(self, job: Job, queue: Queue) -> NoReturn:
        """Performs the job and ends the process; RQ's own hides from the status that it raised."""
        random.seed()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._is_horse = True
        try:
            returned = self.perform_job(job, queue)
        except Exception:
            log.exception("attempt %s: Redis could not be told how it ended", job.id)
            returned = False
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(os.EX_OK if returned else RAISED)

    def handle_job_success(self, job: Job, queue: Queue, started_job_registry: Any) -> None:
        """Removes the attempt: its result stands in the registry. Can be repeated; RQ's cannot."""
        self._remove(job)

    def handle_job_failure(
        self, job: Job, queue: Queue, started_job_registry: Any = None, exc_string: str = ""
    ) -> None:
        """Removes the attempt: RQ neither retries nor keeps it."""
        self._remove(job)

    def _remove(self, job: Job) -> None:
        if self.execution is not None:
            forget(self.connection, job.id, self.execution.id)
        self.connection.hdel(self.key, "current_job")


def perform(order: dict[str, Any], target: str) -> NoReturn:
    """Rebuilds RQ's worker, queue, execution and job as the order names them, and performs it."""
    connection = connect(order["url"])
    records = record_class(target)
    queue = queue_of(connection, records)
    performer = Performer(
        [queue],
        name=order["worker"],
        connection=connection,
        job_class=records,
        serializer=JSONSerializer,
        worker_ttl=order["ttl"],
        prepare_for_work=False,
    )
    record = records.fetch(order["job"], connection=connection, serializer=JSONSerializer)
    performer.execution = Execution(order["execution"], record.id, connection, performer.name)
    performer.main_work_horse(record, queue)


def main(argv: Sequence[str]) -> int:
    """Preloads, waits for the order, obeys it."""
    parent, ready, preload, target = argv
    tie_to_parent(int(parent))
    settings = Settings()
    logs.configure(settings.log_format, settings.log_level)
    traces.configure("work-horse")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    allow_files()
    pipe = int(ready)
    os.set_inheritable(pipe, False)  # its closing tells the worker of this process's end
    _function(preload)()
    os.write(pipe, READY)
    line = sys.stdin.buffer.readline()
    if not line:
        return os.EX_OK
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())
    order = json.loads(line)
    if order["queue"] != QUEUE:
        log.error("an order for the queue %s, this service has only %s", order["queue"], QUEUE)
        return os.EX_USAGE
    try:
        perform(order, target)
    except NoSuchJobError as error:
        log.error("attempt %s is not in Redis any more: %s", order["job"], error)
        return os.EX_TEMPFAIL


def allow_files() -> None:
    """Lets this process have as many files open as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _function(name: str) -> Callable[[], None]:
    """The function that ``module:function`` names."""
    module, _, attribute = name.partition(":")
    function: Callable[[], None] = getattr(import_module(module), attribute)
    return function


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
