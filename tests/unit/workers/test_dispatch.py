"""The dispatcher puts on the queue what is due, once, and gives up what has lost its lease."""

import time

import pytest
import redis
from sqlalchemy import text

from registry import attempts, jobs
from registry.attempts import Claim
from registry.database import Database
from registry.settings import Settings
from workers import dispatch
from workers.delivery import WAITING
from workers.dispatch import Dispatcher

TENANT = "default"
#: What the queue would be: none is asked here.
AWAY = redis.Redis(unix_socket_path="/nowhere")


def lapsed(database: Database) -> Claim:
    """An attempt whose lease has ended."""
    with database.write() as connection:
        job = jobs.submit_job(connection, TENANT, "prepare", base="a", request={}, actor="ada")
        claim = attempts.claim(connection, job.id, 1, "worker", -1.0)
    assert claim is not None
    return claim


def submitted(database: Database, count: int) -> list[str]:
    """The ids of as many jobs, which are due."""
    with database.write() as connection:
        return [
            jobs.submit_job(connection, TENANT, "prepare", base="a", request={}, actor="ada").id
            for _ in range(count)
        ]


def dispatched(database: Database) -> list[float | None]:
    """What is noted of the jobs that are due."""
    with database.read() as connection:
        return [job.dispatched_at for job in attempts.dispatchable(connection)]


def test_what_is_due_is_noted_in_one_transaction_and_not_again_while_it_waits(
    database: Database, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "RECHECK_SECONDS", -1.0)  # each pass looks for all
    dispatcher = Dispatcher(database, connection, Settings(), quick=connection)
    waiting = [f"{job_id}-1".encode() for job_id in submitted(database, 5)]
    dispatcher.tick()
    assert connection.lrange(WAITING, 0, -1) == waiting
    noted = dispatched(database)
    assert len(set(noted)) == 1
    assert None not in noted
    dispatcher.tick()
    assert dispatched(database) == noted
    connection.lrem(WAITING, 0, waiting[2].decode())  # the queue loses one
    dispatcher.tick()
    assert connection.lrange(WAITING, 0, -1) == [*waiting[:2], *waiting[3:], waiting[2]]
    again = dispatched(database)
    assert [place for place in range(5) if again[place] != noted[place]] == [2]


def test_what_the_queue_lost_is_put_there_again_whenever_it_was_noted(
    database: Database, connection: redis.Redis
) -> None:
    """Of a replica whose clock is an hour ahead."""
    (job_id,) = submitted(database, 1)
    with database.write() as writing:
        writing.execute(text("UPDATE jobs SET dispatched_at = :t"), {"t": time.time() + 3600})
    dispatcher = Dispatcher(database, connection, Settings(), quick=connection)
    dispatcher.tick()
    assert connection.lrange(WAITING, 0, -1) == [f"{job_id}-1".encode()]
    connection.flushall()
    dispatcher.tick()
    assert not connection.exists(WAITING)  # it was looked for just now


def test_a_lease_that_is_renewed_after_the_look_is_not_given_up(database: Database) -> None:
    dispatcher = Dispatcher(database, AWAY, Settings(), quick=AWAY)
    dead, living = lapsed(database), lapsed(database)
    lost, _ = dispatcher._look(time.time())
    assert {job.id for job in lost} == {dead.job.id, living.job.id}
    with database.write() as connection:
        attempts.heartbeat(connection, living, 60.0)
    assert [job.id for job in dispatcher._give_up(lost)] == [dead.job.id]
    with database.read() as connection:
        found = [jobs.get_job(connection, TENANT, c.job.id).status for c in (dead, living)]
    assert found == ["queued", "running"]


def test_a_request_that_cannot_be_read_keeps_no_other_job_from_the_queue(
    database: Database,
) -> None:
    dispatcher = Dispatcher(database, AWAY, Settings(), quick=AWAY)
    both = submitted(database, 2)
    with database.write() as connection:
        connection.execute(text("UPDATE jobs SET request = '{' WHERE id = :id"), {"id": both[0]})
    _, due = dispatcher._look(time.time())
    assert [job.id for job in due] == both
