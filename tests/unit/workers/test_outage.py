"""Redis killed, restarted and wiped under a worker."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from tests.unit.workers.conftest import Workplace, until
from tests.unit.workers.errands import TARGET
from workers.connection import connect
from workers.delivery import HANDED_OVER, WAITING, enqueue, is_known, record_id, workers_ready
from workers.embedded import EmbeddedQueue

LONG, SHORT = 3.0, 1.0


@pytest.fixture
def own_queue(short: Path) -> Iterator[EmbeddedQueue]:
    queue = EmbeddedQueue(short / "queue", short / "s")
    queue.start()
    try:
        queue.wait_ready()
        yield queue
    finally:
        queue.stop()


@pytest.fixture
def outage(own_queue: EmbeddedQueue, kill: Callable[[int], None]) -> Callable[[float], None]:
    def outage(seconds: float) -> None:
        pid = own_queue.pid
        assert pid is not None
        kill(pid)
        until(lambda: own_queue.poll() is not None)
        time.sleep(seconds)
        own_queue.start()
        own_queue.wait_ready()
        assert own_queue.pid != pid

    return outage


@pytest.fixture
def place(own_queue: EmbeddedQueue, tmp_path: Path) -> Iterator[Workplace]:
    place = Workplace(tmp_path, own_queue.url)
    yield place
    place.close()


@pytest.fixture
def client(own_queue: EmbeddedQueue) -> Iterator[redis.Redis]:
    client = connect(own_queue.url)
    yield client
    client.close()


def test_worker_outlives_a_restart_of_redis_idle_and_busy(
    client: redis.Redis, place: Workplace, outage: Callable[[float], None]
) -> None:
    worker = place.work()
    until(lambda: workers_ready(client) == 1)
    outage(SHORT)
    enqueue(client, "job_a", 1, target=TARGET)
    place.count("ended", 1)

    enqueue(client, "wait_b", 1, target=TARGET)
    place.count("begun", 2)
    outage(LONG)
    assert is_known(client, "wait_b", 1)
    place.release()
    place.count("ended", 2)
    until(lambda: not is_known(client, "wait_b", 1))
    until(lambda: workers_ready(client) == 1)
    assert worker.poll() is None
    assert place.trace("lost") == []


def test_attempt_may_end_while_redis_is_away(
    client: redis.Redis, place: Workplace, outage: Callable[[float], None]
) -> None:
    worker = place.work()
    enqueue(client, "wait_a", 1, target=TARGET)
    place.count("begun", 1)
    ending = threading.Timer(0.5, place.release)
    ending.start()
    outage(SHORT)
    ending.join()
    until(lambda: not is_known(client, "wait_a", 1))
    assert len(place.trace("ended")) == 1
    enqueue(client, "job_b", 1, target=TARGET)
    place.count("ended", 2)
    assert worker.poll() is None
    assert place.trace("lost") == []


def test_wiped_redis_learns_again_of_worker_and_attempt(
    connection: redis.Redis, workplace: Workplace
) -> None:
    workplace.work()
    enqueue(connection, "wait_a", 1, target=TARGET)
    workplace.count("begun", 1)
    connection.flushall()
    assert not is_known(connection, "wait_a", 1)
    until(lambda: is_known(connection, "wait_a", 1))
    assert not enqueue(connection, "wait_a", 1, target=TARGET)
    until(lambda: workers_ready(connection) == 1)
    workplace.release()
    workplace.count("ended", 1)
    until(lambda: not is_known(connection, "wait_a", 1))
    assert list(connection.scan_iter("rq:*wait_a*")) == []
    connection.flushall()
    until(lambda: workers_ready(connection) == 1)
    assert workplace.trace("lost") == []


def test_attempt_taken_but_never_started_is_queued_again(
    connection: redis.Redis, workplace: Workplace
) -> None:
    enqueue(connection, "job_a", 1, target=TARGET)
    connection.lmove(WAITING, HANDED_OVER)  # and here its worker died
    assert is_known(connection, "job_a", 1)
    assert not enqueue(connection, "job_a", 1, target=TARGET)
    workplace.work(lease=3.0)
    workplace.count("ended", 1)
    until(lambda: connection.llen(HANDED_OVER) == 0)
    assert len(workplace.trace("begun")) == 1


def test_sigterm_ends_an_idle_worker_while_redis_is_away(
    client: redis.Redis, place: Workplace, own_queue: EmbeddedQueue
) -> None:
    worker = place.work()
    until(lambda: workers_ready(client) == 1)
    own_queue.stop()
    time.sleep(0.5)
    worker.terminate()
    assert worker.wait(30) == 0  # a client's patience is longer


def test_commands_wait_out_an_outage(
    client: redis.Redis, own_queue: EmbeddedQueue, outage: Callable[[float], None]
) -> None:
    results: list[bool] = []

    def enqueue_in_the_outage() -> None:
        until(lambda: own_queue.poll() is not None)
        results.append(enqueue(client, "job_a", 1))

    thread = threading.Thread(target=enqueue_in_the_outage)
    thread.start()
    outage(SHORT)
    thread.join(60)
    assert results == [True]
    assert client.lrange(WAITING, 0, -1) == [record_id("job_a", 1).encode()]


def test_without_patience_an_outage_shows_at_once(own_queue: EmbeddedQueue) -> None:
    own_queue.stop()
    client = connect(own_queue.url, patience=0)
    start = time.monotonic()
    with pytest.raises(redis.exceptions.ConnectionError):
        client.ping()
    client.close()
    assert time.monotonic() - start < 30.0  # the default patience is longer
