"""A Valkey for the folder's tests, and workers on it; a registry to perform jobs in."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from tests.unit.workers.rooms import Room
from workers.connection import connect
from workers.embedded import EmbeddedQueue
from workers.supervisor import kill_group
from workers.tether import tethered


def until(condition: Callable[[], bool]) -> None:
    """Waits for a condition; fails the test if it never holds."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > 60.0:
            pytest.fail(f"not within a minute: {condition}")
        time.sleep(0.005)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Workplace:
    """A folder of traces and the workers that leave them."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.url = url
        self.workers: list[subprocess.Popen[bytes]] = []

    def trace(self, name: str) -> list[list[str]]:
        """The lines of a trace, in words."""
        path = self.folder / name
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def count(self, name: str, at_least: int) -> list[list[str]]:
        """Waits for a trace's lines."""
        until(lambda: len(self.trace(name)) >= at_least)
        return self.trace(name)

    def spare(self) -> int:
        """The pid of the latest work-horse that has preloaded."""
        return int(self.trace("spares")[-1][0])

    def release(self) -> None:
        """Lets waiting errands end."""
        (self.folder / "release").touch()

    def work(self, lease: float = 15.0, grace: float = 60.0) -> subprocess.Popen[bytes]:
        """Starts a worker and waits for its spare."""
        spares = len(self.trace("spares"))
        command = [sys.executable, "-m", "tests.unit.workers.errands", self.url]
        worker = subprocess.Popen(
            tethered([*command, str(lease), str(grace)]),
            env={**os.environ, "ERRAND_FOLDER": str(self.folder)},
            cwd=Path(__file__).parents[3],
        )
        self.workers.append(worker)
        self.count("spares", spares + 1)
        return worker

    def close(self) -> None:
        """Ends every worker."""
        for worker in self.workers:
            worker.kill()
            worker.wait()
            kill_group(worker.pid)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    """A registry with its base prepared, in which jobs are performed without a queue."""
    room = Room(tmp_path_factory.mktemp("room"))
    yield room
    room.database.close()


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path is short enough for a Unix socket."""
    with tempfile.TemporaryDirectory(prefix="eq") as folder:
        yield Path(folder)


@pytest.fixture(scope="package")
def shared_queue() -> Iterator[EmbeddedQueue]:
    with tempfile.TemporaryDirectory(prefix="eq") as folder:
        queue = EmbeddedQueue(Path(folder) / "queue", Path(folder) / "s")
        queue.start()
        try:
            queue.wait_ready()
            yield queue
        finally:
            queue.stop()


@pytest.fixture
def connection(shared_queue: EmbeddedQueue) -> Iterator[redis.Redis]:
    """A client of the shared queue, emptied."""
    client = connect(shared_queue.url)
    client.flushall()
    yield client
    client.close()


@pytest.fixture
def workplace(
    connection: redis.Redis, shared_queue: EmbeddedQueue, tmp_path: Path
) -> Iterator[Workplace]:
    """A workplace on the shared queue."""
    place = Workplace(tmp_path, shared_queue.url)
    yield place
    place.close()


@pytest.fixture
def kill() -> Callable[[int], None]:
    """kill -9."""
    return lambda pid: os.kill(pid, signal.SIGKILL)
