"""Children are restarted, stopped, and never orphaned."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.unit.workers.conftest import alive, until
from workers.connection import connect
from workers.embedded import EmbeddedQueue
from workers.supervisor import Child, Supervisor

ROOT = Path(__file__).parents[3]
SLEEP = ["sleep", "600"]
STUBBORN = ["sh", "-c", "trap '' TERM; echo > $MARK; while :; do sleep 0.05; done"]


@pytest.fixture
def supervise() -> Iterator[Callable[..., Supervisor]]:
    made: list[Supervisor] = []

    def supervise(*children: Child) -> Supervisor:
        made.append(Supervisor(children))
        return made[-1]

    yield supervise
    for supervisor in made:
        supervisor.stop(0.0)


def ticking(supervisor: Supervisor, condition: Callable[[], bool]) -> Callable[[], bool]:
    def ticked() -> bool:
        supervisor.tick()
        return condition()

    return ticked


def test_a_child_that_dies_is_restarted(supervise, kill, caplog) -> None:
    supervisor = supervise(Child("one", SLEEP), Child("two", SLEEP))
    supervisor.start()
    before = supervisor.pids()
    assert set(before) == {"one", "two"}
    kill(before["one"])
    until(ticking(supervisor, lambda: supervisor.pids().get("one", before["one"]) != before["one"]))
    after = supervisor.pids()
    assert after["two"] == before["two"]
    assert f"one (pid {before['one']}) ended with signal SIGKILL; it starts" in caplog.text
    assert "again in 0.1 s" in caplog.text


def test_restarts_are_spaced_out(supervise, tmp_path: Path) -> None:
    trace = tmp_path / "starts"
    trace.touch()
    command = ["sh", "-c", f"date +%s.%N >> {trace}; exit 3"]
    supervisor = supervise(Child("failing", command))
    supervisor.start()
    until(ticking(supervisor, lambda: len(trace.read_text().split()) >= 4))
    starts = [float(word) for word in trace.read_text().split()]
    gaps = [later - earlier for earlier, later in pairwise(starts)]
    assert all(gap > delay for gap, delay in zip(gaps, (0.1, 0.2, 0.4), strict=True))


def test_a_tick_waits_for_no_restart(supervise, caplog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.supervisor._FIRST_DELAY", 60.0)
    supervisor = supervise(Child("failing", ["false"]))
    supervisor.start()
    start = time.monotonic()
    until(ticking(supervisor, lambda: "it starts again in 60.0 s" in caplog.text))
    supervisor.tick()
    assert time.monotonic() - start < 30.0


def test_stop_asks_in_reverse_order(supervise, tmp_path: Path) -> None:
    trace = tmp_path / "ends"

    def child(name: str) -> Child:
        code = f"trap 'echo {name} >> {trace}; exit 0' TERM; echo > {tmp_path / name}; "
        return Child(name, ["sh", "-c", code + "while :; do sleep 0.02; done"])

    supervisor = supervise(child("first"), child("second"))
    supervisor.start()
    until(lambda: all((tmp_path / name).exists() for name in ("first", "second")))
    supervisor.stop(60.0)
    assert trace.read_text().split() == ["second", "first"]
    assert supervisor.pids() == {}


def test_stop_kills_at_the_deadline(supervise, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    supervisor = supervise(Child("polite", SLEEP), Child("stubborn", STUBBORN, {"MARK": str(mark)}))
    supervisor.start()
    until(mark.exists)
    pids = list(supervisor.pids().values())
    start = time.monotonic()
    supervisor.stop(0.3)
    assert 0.3 <= time.monotonic() - start < 30.0
    assert not any(alive(pid) for pid in pids)


def test_children_die_with_a_killed_supervisor(tmp_path: Path) -> None:
    code = (
        "import sys; from workers.supervisor import Child, Supervisor;"
        f" supervisor = Supervisor([Child('a', {SLEEP!r}), Child('b', {SLEEP!r})]);"
        " supervisor.start(); print(*supervisor.pids().values(), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 2
        process.send_signal(signal.SIGKILL)
        until(lambda: not any(alive(pid) for pid in pids))


def test_ready_asks_every_child(supervise, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    supervisor = supervise(Child("one", SLEEP), Child("two", SLEEP, ready=mark.exists))
    supervisor.start()
    assert not supervisor.ready()
    mark.touch()
    assert supervisor.ready()


def test_it_keeps_the_queue_alive(supervise, short: Path, kill) -> None:
    queue = EmbeddedQueue(short / "queue", short / "s")
    supervisor = supervise(queue.child())
    supervisor.start()
    until(supervisor.ready)
    client = connect(queue.url)
    client.set("kept", "1")
    kill(supervisor.pids()["queue"])
    until(ticking(supervisor, supervisor.ready))
    assert client.get("kept") == b"1"
    client.close()
    supervisor.stop(5.0)
    queue.close()


def test_a_command_that_is_missing_is_tried_again(supervise, tmp_path: Path) -> None:
    command = tmp_path / "later"
    supervisor = supervise(Child("later", [str(command)]))
    supervisor.start()
    until(ticking(supervisor, lambda: supervisor.pids() == {}))
    command.write_text("#!/bin/sh\nexec sleep 60\n")
    command.chmod(0o755)

    def runs() -> bool:
        pid = supervisor.pids().get("later")
        return pid is not None and Path(f"/proc/{pid}/comm").read_text() == "sleep\n"

    until(ticking(supervisor, runs))


def test_who_is_dismissed_ends_at_its_own_pace_and_starts_no_more(
    supervise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told once: a second SIGTERM would hurry a worker that finishes its attempt."""
    monkeypatch.setenv("FOLDER", str(tmp_path))
    script = 'trap "echo told >> $FOLDER/told" TERM; echo > $FOLDER/up;'
    script += " while ! [ -e $FOLDER/end ]; do sleep 0.05; done"
    supervisor = supervise(Child("other", SLEEP), Child("worker-1", ["bash", "-c", script]))
    supervisor.start()
    until(lambda: (tmp_path / "up").exists())
    supervisor.dismiss("worker-")
    until(lambda: (tmp_path / "told").exists())
    supervisor.dismiss("worker-")
    (tmp_path / "end").touch()
    until(ticking(supervisor, lambda: supervisor.pids().keys() == {"other"}))
    time.sleep(0.3)
    supervisor.tick()
    assert supervisor.pids().keys() == {"other"}
    assert (tmp_path / "told").read_text() == "told\n"
    supervisor.stop(5)
    assert supervisor.pids() == {}


def test_it_refuses_other_threads(supervise) -> None:
    supervisor = supervise(Child("one", SLEEP))
    errors: list[str] = []

    def start() -> None:
        try:
            supervisor.start()
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert "main thread" in errors[0]
    assert supervisor.pids() == {}


def test_names_are_unique() -> None:
    with pytest.raises(ValueError, match="names of their own"):
        Supervisor([Child("one", SLEEP), Child("one", SLEEP)])
