"""What is done to a service while one of its processes is held at a point."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import httpx
from sqlalchemy import text

from tests.faults.checks import ShowsNothing
from tests.faults.points import Strike
from tests.faults.stage import Stage, is_gone, parent_of, wait_at_most
from tests.service import wait_for
from workers.connection import connect

#: Longer than a lease, so that what fails on a full disk has failed.
_FULL_SECONDS = 2.0
_GIVE_UP_SECONDS = 60.0
_END_CONNECTIONS = text(
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


def strike(stage: Stage, how: Strike, held: int, endpoint: str) -> None:
    """Strike, let what still lives go on, and start again what a supervisor outside would.

    Args:
        held: the process that is held at the point.
        endpoint: what the run is about.

    Raises:
        ShowsNothing: it did not fall.
    """
    service = stage.service
    match how:
        case "api":
            below = service.kill_api()
            wait_for(lambda: all(is_gone(pid) for pid in below), 10)
            stage.let_go()
            service.launch()
        case "engine" | "queue":
            _kill(service.pid(how))
        case "worker":
            _kill(parent_of(held))
            wait_for(lambda: is_gone(held), 10)  # the work-horse that hangs on it
        case "horse":
            _kill(held)
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
                _see(lambda: "lost" in _outcomes(stage, endpoint), "its attempt is not given up")
        case "zombie":
            with _stopped(parent_of(held)):
                with _stopped(held):
                    _see(lambda: "succeeded" in _outcomes(stage, endpoint), "nobody does its job")
                    stage.let_go()
                _see(lambda: is_gone(held), "it woke and does not end")
    stage.let_go()


@contextmanager
def _stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _see(condition: Callable[[], bool], otherwise: str) -> None:
    if not wait_at_most(_GIVE_UP_SECONDS, condition):
        raise ShowsNothing(f"a work-horse is stopped, and in {_GIVE_UP_SECONDS:g} s {otherwise}")


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: is_gone(pid), 10)


def _outcomes(stage: Stage, endpoint: str) -> list[str]:
    """How the attempts at the endpoint's job stand."""
    try:
        jobs = stage.service.get(f"/v1/jobs?endpoint={endpoint}")["data"]
    except httpx.HTTPError:
        return []
    return [attempt["outcome"] for job in jobs for attempt in job["attempts"]]
