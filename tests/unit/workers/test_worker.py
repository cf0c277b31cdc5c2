"""One attempt, one work-horse: performed, lost, stopped."""

import os
import signal
import time

import pytest
import redis

from registry.errors import Unavailable
from registry.settings import Settings
from tests.unit.workers.conftest import Workplace, alive, until
from tests.unit.workers.errands import TARGET
from workers.delivery import QUEUE, enqueue, is_known, stop, workers_ready
from workers.pulse import Timing
from workers.worker import work


def queue(connection: redis.Redis, job_id: str, attempt: int = 1) -> bool:
    return enqueue(connection, job_id, attempt, target=TARGET)


def test_attempts_run_in_preloaded_spares_and_leave_nothing(
    connection: redis.Redis, workplace: Workplace
) -> None:
    workplace.work()
    first = workplace.spare()
    queue(connection, "job_a")
    queue(connection, "job_b", 7)
    ended = workplace.count("ended", 2)
    assert [line[:2] for line in ended] == [["job_a", "1"], ["job_b", "7"]]
    assert int(ended[0][2]) == first
    assert ended[1][2] in {line[0] for line in workplace.trace("spares")}
    assert ended[0][2] != ended[1][2]
    until(lambda: not is_known(connection, "job_b", 7))
    until(lambda: list(connection.scan_iter("rq:*job_*")) == [])
    assert connection.zcard(f"rq:wip:{QUEUE}") == 0
    assert connection.llen(f"rq:queue:{QUEUE}:intermediate") == 0
    assert workplace.trace("lost") == []


def test_a_ready_spare_starts_at_once(connection: redis.Redis, workplace: Workplace) -> None:
    workplace.work()
    until(lambda: workers_ready(connection) == 1)
    (workplace.folder / "slow").touch()  # the next one is never ready
    queue(connection, "job_a")
    assert workplace.count("ended", 1)[0][2] == str(workplace.spare())


def test_between_attempts_a_worker_is_there_though_its_next_spare_is_not(
    connection: redis.Redis, workplace: Workplace
) -> None:
    workplace.work(lease=3.0)  # it says its state every .6 s
    until(lambda: workers_ready(connection) == 1)
    (workplace.folder / "slow").touch()
    queue(connection, "job_a")
    workplace.count("ended", 1)
    until(lambda: not is_known(connection, "job_a", 1))
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        assert workers_ready(connection) == 1
        time.sleep(0.02)
    queue(connection, "job_b")
    (workplace.folder / "slow").unlink()
    workplace.count("ended", 2)


@pytest.mark.parametrize("kind", ["crash", "exit", "raise", "crash_hook"])
def test_a_work_horse_that_dies_is_reported_by_its_own_worker(
    connection: redis.Redis, workplace: Workplace, kind: str
) -> None:
    worker = workplace.work()
    queue(connection, f"{kind}_x", 3)
    assert workplace.count("lost", 1)[0][:3] == [f"{kind}_x", "3", str(worker.pid)]
    until(lambda: not is_known(connection, f"{kind}_x", 3))
    queue(connection, "job_after")
    assert workplace.count("ended", 1)[0][0] == "job_after"
    assert len(workplace.trace("lost")) == 1


def test_a_work_horse_that_stands_still_is_killed(
    connection: redis.Redis, workplace: Workplace
) -> None:
    """Asleep it lives on; stopped it might hold a lock for ever."""
    workplace.work(lease=1)
    queue(connection, "wait_a")
    horse = int(workplace.count("begun", 1)[0][2])
    time.sleep(2.5)
    assert alive(horse)
    os.kill(horse, signal.SIGSTOP)
    lost = workplace.count("lost", 1)[0]
    assert lost[:2] == ["wait_a", "1"]
    until(lambda: not alive(horse))


def test_a_spare_that_dies_costs_no_attempt(
    connection: redis.Redis, workplace: Workplace, kill
) -> None:
    workplace.work()
    spare = workplace.spare()
    until(lambda: workers_ready(connection) == 1)
    kill(spare)
    until(lambda: not alive(spare))
    queue(connection, "job_a")  # taken before the worker has looked at its spare again
    workplace.count("ended", 1)
    assert len(workplace.trace("begun")) == 1
    assert workplace.trace("lost") == []


def test_a_worker_whose_preload_fails_takes_no_attempt(
    connection: redis.Redis, workplace: Workplace, kill
) -> None:
    workplace.work()
    until(lambda: workers_ready(connection) == 1)
    (workplace.folder / "broken").touch()
    kill(workplace.spare())
    until(lambda: workers_ready(connection) == 0)
    queue(connection, "job_a")
    time.sleep(0.5)
    assert connection.llen(f"rq:queue:{QUEUE}") == 1
    (workplace.folder / "broken").unlink()
    workplace.count("ended", 1)


def test_a_killed_worker_takes_its_work_horses_along(
    connection: redis.Redis, workplace: Workplace, kill
) -> None:
    worker = workplace.work()
    queue(connection, "wait_a")
    horse = int(workplace.count("begun", 1)[0][2])
    workplace.count("spares", 2)
    spare = workplace.spare()
    assert alive(horse)
    assert alive(spare)
    assert horse != spare
    kill(worker.pid)
    until(lambda: not alive(horse) and not alive(spare))


def test_a_killed_workers_attempt_is_reported_by_another(
    connection: redis.Redis, workplace: Workplace, kill
) -> None:
    first = workplace.work(lease=3.0)
    queue(connection, "wait_a")
    workplace.count("begun", 1)
    second = workplace.work(lease=3.0)
    assert is_known(connection, "wait_a", 1)
    kill(first.pid)
    lost = workplace.count("lost", 1)[0]
    assert lost[:3] == ["wait_a", "1", str(second.pid)]
    assert not is_known(connection, "wait_a", 1)
    assert queue(connection, "wait_a", 2)
    until(lambda: connection.scard("rq:workers") == 1)


def test_stop_kills_what_runs(connection: redis.Redis, workplace: Workplace) -> None:
    workplace.work()
    assert not stop(connection, "wait_a", 1)
    queue(connection, "wait_a")
    horse = int(workplace.count("begun", 1)[0][2])
    assert stop(connection, "wait_a", 1)
    until(lambda: not alive(horse))
    assert workplace.count("lost", 1)[0][:2] == ["wait_a", "1"]


def test_sigterm_ends_an_idle_worker_at_once(connection: redis.Redis, workplace: Workplace) -> None:
    worker = workplace.work()
    spare = workplace.spare()
    until(lambda: workers_ready(connection) == 1)
    worker.terminate()
    assert worker.wait(30) == 0  # an attempt would have a minute
    assert not alive(spare)
    assert workers_ready(connection) == 0


def test_sigterm_lets_a_running_attempt_end(connection: redis.Redis, workplace: Workplace) -> None:
    worker = workplace.work()
    queue(connection, "wait_a")
    queue(connection, "job_next")
    workplace.count("begun", 1)
    worker.terminate()
    time.sleep(0.3)
    assert worker.poll() is None
    workplace.release()
    assert worker.wait(30) == 0
    assert [line[0] for line in workplace.trace("ended")] == ["wait_a"]
    assert is_known(connection, "job_next", 1)
    assert workplace.trace("lost") == []


def test_sigterms_grace_ends(connection: redis.Redis, workplace: Workplace) -> None:
    worker = workplace.work(grace=0.5)
    queue(connection, "wait_a")
    workplace.count("begun", 1)
    worker.terminate()
    assert worker.wait(30) == 0
    assert workplace.trace("ended") == []
    assert workplace.trace("stopped")[0][:2] == ["wait_a", "1"]
    assert workplace.trace("lost") == []


def test_a_second_signal_stops_at_once(connection: redis.Redis, workplace: Workplace) -> None:
    worker = workplace.work(grace=60.0)
    queue(connection, "wait_a")
    workplace.count("begun", 1)
    worker.send_signal(signal.SIGSTOP)  # it finds both signals together however busy the machine is
    worker.terminate()
    worker.send_signal(signal.SIGINT)  # an echo within a second is not a second signal
    worker.send_signal(signal.SIGCONT)
    time.sleep(1.1)
    assert worker.poll() is None
    start = time.monotonic()
    while not workplace.trace("stopped"):  # told again where it found the first two late
        worker.terminate()
        time.sleep(1.1)
    assert worker.wait(30) == 0
    assert time.monotonic() - start < 30.0
    assert workplace.trace("stopped")[0][:2] == ["wait_a", "1"]
    assert workplace.trace("lost") == []


def test_a_worker_without_a_queue_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    with pytest.raises(Unavailable, match="REDIS_URL"):
        work(Settings())


def test_timing_scales_down_with_the_lease_and_never_up() -> None:
    assert Timing.for_lease(15.0) == Timing.for_lease(600.0) == Timing()
    short = Timing.for_lease(3.0)
    assert short.ttl >= 2 * short.beat + 1  # Redis's registry counts in whole seconds
