"""What is done to a service while one of its processes is held at a point."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
from sqlalchemy import text

from tests.faults.points import Strike
from tests.faults.stage import Stage, is_gone, wait_at_most
from tests.service import wait_for
from workers.connection import connect

#: Longer than a lease, so that what fails on a full disk has failed.
_FULL_SECONDS = 2.0
_GIVE_UP_SECONDS = 15.0
_END_CONNECTIONS = text(
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


def strike(stage: Stage, how: Strike, held: int, endpoint: str) -> None:
    """Strike, let what still lives go on, and start again what a supervisor outside would.

    Args:
        held: the process that is held at the point.
        endpoint: what the run is about.
    """
    service = stage.service
    match how:
        case "api":
            below = service.kill_api()
            wait_for(lambda: all(is_gone(pid) for pid in below), 10)
            stage.let_go()
            service.launch()
        case "engine" | "worker" | "queue":
            pid = service.pid(how)
            service.kill(how)
            wait_for(lambda: is_gone(pid), 10)
        case "horse":
            os.kill(held, signal.SIGKILL)
            wait_for(lambda: is_gone(held), 10)
        case "wipe":
            with connect(stage.queue_url) as redis:
                redis.flushall()
        case "database":
            with stage.sql.begin() as connection:
                connection.execute(_END_CONNECTIONS)
        case "disk":
            with stage.full_disk():
                stage.let_go()
                time.sleep(_FULL_SECONDS)
        case "freeze":
            with _stopped(held):
                wait_at_most(_GIVE_UP_SECONDS, _given_up(stage, endpoint))
        case "zombie":
            with _stopped(service.pid("worker")):
                with _stopped(held):
                    wait_at_most(_GIVE_UP_SECONDS, _given_up(stage, endpoint))
                    stage.let_go()
                wait_at_most(_GIVE_UP_SECONDS, lambda: is_gone(held))
    stage.let_go()


@contextmanager
def _stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _given_up(stage: Stage, endpoint: str) -> Callable[[], bool]:
    """Whether the endpoint's job has lost an attempt."""

    def asked() -> bool:
        client = stage.service.client
        try:
            jobs: list[dict[str, Any]] = client.get(
                "/v1/jobs", params={"endpoint": endpoint}
            ).json()["data"]
        except httpx.HTTPError:
            return False
        return any(a["outcome"] == "lost" for job in jobs for a in job["attempts"])

    return asked
