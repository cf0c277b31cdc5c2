"""Enqueueing once, and refusing what this service did not write."""

import json
import pickle
import threading
import time
import zlib

import pytest
import redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer

from tests.unit.workers.conftest import Workplace, until
from tests.unit.workers.errands import TARGET
from workers.connection import connect
from workers.delivery import (
    EXECUTION,
    HANDED_OVER,
    STARTED,
    WAITING,
    AttemptRecord,
    JobRefused,
    enqueue,
    forget,
    is_known,
)
from workers.recovery import Recovery

PWN = "tests.unit.workers.errands.pwn"


def test_an_attempt_is_queued_once(connection: redis.Redis) -> None:
    assert not is_known(connection, "job_a", 1)
    assert enqueue(connection, "job_a", 1)
    assert not enqueue(connection, "job_a", 1)
    assert enqueue(connection, "job_a", 2)
    assert connection.lrange(WAITING, 0, -1) == [b"job_a-1", b"job_a-2"]
    assert is_known(connection, "job_a", 1)
    assert not is_known(connection, "job_a", 3)
    record = AttemptRecord.fetch("job_a-1", connection=connection, serializer=JSONSerializer)
    assert record.func_name == "workers.run.run"
    assert record.args == ["job_a", 1]
    assert (record.timeout, record.result_ttl, record.should_retry) == (-1, 0, False)


def test_an_attempt_is_queued_once_by_many(connection: redis.Redis) -> None:
    answers: list[bool] = []
    threads = [
        threading.Thread(target=lambda: answers.append(enqueue(connection, "job_a", 1)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [False] * 7 + [True]
    assert connection.llen(WAITING) == 1


def test_a_started_attempt_is_known_until_its_heartbeat_ends(connection: redis.Redis) -> None:
    enqueue(connection, "job_a", 1)
    connection.lpop(WAITING)
    execution = f"{EXECUTION}job_a-1:execution"
    connection.zadd(STARTED, {"job_a-1:execution": time.time() + 60})
    connection.set(execution, "its heartbeat")
    assert is_known(connection, "job_a", 1)
    assert not enqueue(connection, "job_a", 1)
    connection.delete(execution)
    assert not is_known(connection, "job_a", 1)
    assert enqueue(connection, "job_a", 1)
    forget(connection, "job_a-1", "execution")  # the old worker's last word spares the new record
    assert is_known(connection, "job_a", 1)


def test_a_workers_clock_does_not_end_its_heartbeat(connection: redis.Redis) -> None:
    """Of a worker that is a minute behind, and of a dead one that was a minute ahead."""
    recovery = Recovery(connection, patience=60)
    connection.zadd(STARTED, {"job_a-1:x": time.time() - 60, "job_b-2:y": time.time() + 60})
    connection.set(f"{EXECUTION}job_a-1:x", "its heartbeat", ex=60)
    assert is_known(connection, "job_a", 1)
    assert recovery.sweep() == [("job_b", 2)]
    assert recovery.sweep() == []
    assert connection.zrange(STARTED, 0, -1) == [b"job_a-1:x"]


def test_an_attempt_runs_once_however_often_it_is_queued(
    connection: redis.Redis, workplace: Workplace
) -> None:
    workplace.work()
    assert enqueue(connection, "wait_a", 1, target=TARGET)
    assert not enqueue(connection, "wait_a", 1, target=TARGET)
    workplace.count("begun", 1)
    assert not enqueue(connection, "wait_a", 1, target=TARGET)
    workplace.release()
    until(lambda: not is_known(connection, "wait_a", 1))
    assert len(workplace.trace("begun")) == 1
    assert enqueue(connection, "wait_a", 1, target=TARGET)
    workplace.count("ended", 2)


@pytest.mark.parametrize(("job_id", "attempt"), [("a b", 1), ("../x", 1), ("", 1), ("a", -1)])
def test_what_is_no_id_is_not_queued(connection: redis.Redis, job_id: str, attempt: int) -> None:
    with pytest.raises(JobRefused):
        enqueue(connection, job_id, attempt)
    assert connection.dbsize() == 0


def forge(connection: redis.Redis, identifier: str, data: bytes, **fields: str) -> None:
    """A record that this service did not write."""
    mapping = {"data": zlib.compress(data), "status": "queued", "origin": "errata", **fields}
    connection.hset(f"rq:job:{identifier}", mapping=mapping)
    connection.rpush(WAITING, identifier)


def call(function: str, *arguments: object) -> bytes:
    return json.dumps([function, None, arguments, {}]).encode()


def test_forged_records_are_removed_and_never_run(
    connection: redis.Redis, workplace: Workplace
) -> None:
    own = call(TARGET, "job_a", 1)
    touch = f"touch {workplace.folder}/owned"
    forge(connection, "job_a-1", call("os.system", touch))
    forge(connection, "job_b-1", call(PWN, "job_b", 1))
    forge(connection, "job_c-1", pickle.dumps((PWN, None, ("job_c", 1), {})))
    forge(connection, "job_d-1", own)  # another's call
    forge(connection, "job_e-1", b"[" * 100_000)
    forge(connection, "job_f-1", b'"' + b"x" * 50_000_000)
    forge(connection, "job_g-1", call(TARGET, "job_g", 1), status="sinister")
    forge(connection, "job_h-1", call(TARGET, "job_h", 1), started_at="yesterday")
    forge(connection, "no id", own)
    connection.rpush(WAITING, b"\xff\xfe", "job_x-1:..", "job_y-1")
    connection.set("rq:job:job_z-1", "no hash")
    connection.rpush(WAITING, "job_z-1")
    connection.zadd(STARTED, {"malformed": 1, b"\xff:\xff": 1, "job_q-1": 1})
    Queue("errata", connection=connection).enqueue(PWN, "job_r", 1, job_id="job_r-1")
    connection.rpush(HANDED_OVER, b"\xff", "job_s-1")
    forge(
        connection,
        "job_t-1",
        call(TARGET, "job_t", 1),
        success_callback_name=PWN,
        failure_callback_name=PWN,
        repeats_left="5",
        retries_left="5",
        webhooks=json.dumps([{"url": "http://127.0.0.1:9/", "job_status": "finished"}]),
    )
    worker = workplace.work(lease=3.0)
    enqueue(connection, "job_last", 1, target=TARGET)
    ended = workplace.count("ended", 2)
    assert [line[0] for line in ended] == ["job_t", "job_last"]
    until(lambda: connection.llen(HANDED_OVER) == 0)
    until(lambda: connection.zcard(STARTED) == 0)
    until(lambda: list(connection.scan_iter("rq:job:*")) == [])
    assert worker.poll() is None
    assert workplace.trace("pwned") == []
    assert not (workplace.folder / "owned").exists()
    assert len(workplace.trace("begun")) == 2


def test_rq_itself_would_have_run_it(connection: redis.Redis) -> None:
    forge(connection, "job_a-1", call("os.getcwd"))
    assert Job.fetch("job_a-1", connection=connection, serializer=JSONSerializer).perform()
    with pytest.raises(JobRefused):
        AttemptRecord.fetch("job_a-1", connection=connection, serializer=JSONSerializer)


def test_a_url_that_is_none_is_refused() -> None:
    from registry.errors import Unavailable

    with pytest.raises(Unavailable, match="REDIS_URL"):
        connect("http://localhost")
