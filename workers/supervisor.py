"""Keeps child processes alive without threads: ``start``, ``tick`` now and then, ``stop``.

Children are tethered: none outlives this process, however it ends. That holds only for children
spawned from the main thread, so ``start`` and ``tick`` refuse to run elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from workers.tether import tethered

log = logging.getLogger(__name__)

_FIRST_DELAY = 0.1  # seconds before the first restart; doubled for each further one
_LONGEST_DELAY = 5.0
_HEALTHY_SECONDS = 10.0  # a child that lived this long starts again with the first delay
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Child:
    """A process to keep alive.

    Args:
        name: its name in logs and in ``Supervisor.pids``.
        command: its argv.
        environment: variables added to this process's own.
        ready: says whether it serves; None: it does as soon as it runs.
        prepare: called before each start.
        pass_fds: file descriptors it inherits.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    ready: Callable[[], bool] | None = None
    prepare: Callable[[], None] | None = None
    pass_fds: tuple[int, ...] = ()

    def spawn(self) -> subprocess.Popen[bytes]:
        """Starts it, tethered, in a process group of its own (a terminal's Ctrl-C spares it)."""
        if self.prepare is not None:
            self.prepare()
        return subprocess.Popen(
            tethered(self.command),
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            pass_fds=self.pass_fds,
            process_group=0,
        )


class _Charge:
    """One child under supervision: its process, and when it may start again."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.process: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0
        self.restart_at = 0.0
        self.delay = _FIRST_DELAY
        self.dismissed = False

    def start(self) -> None:
        self.dismissed = False
        self.started_at = time.monotonic()
        try:
            self.process = self.child.spawn()
        except OSError as error:
            log.error("%s cannot be started: %s", self.child.name, error)
            self._wait_longer()
            return
        log.info("%s started with pid %d", self.child.name, self.process.pid)

    def tick(self) -> None:
        if self.dismissed:
            return
        if self.process is None:
            if time.monotonic() >= self.restart_at:
                self.start()
            return
        status = self.process.poll()
        if status is None:
            return
        kill_group(self.process.pid)
        if time.monotonic() - self.started_at >= _HEALTHY_SECONDS:
            self.delay = _FIRST_DELAY
        log.warning(
            "%s (pid %d) ended with %s; it starts again in %.1f s",
            self.child.name,
            self.process.pid,
            describe(status),
            self.delay,
        )
        self.process = None
        self._wait_longer()

    def dismiss(self) -> None:
        if self.process is not None and not self.dismissed:
            self.process.terminate()
        self.dismissed = True

    def stop(self, seconds: float) -> None:
        self.dismiss()
        if self.process is not None:
            _await_end(self.process, seconds, self.child.name)
        self.process = None

    def _wait_longer(self) -> None:
        self.restart_at = time.monotonic() + self.delay
        self.delay = min(2 * self.delay, _LONGEST_DELAY)

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def ready(self) -> bool:
        return self.alive() and (self.child.ready is None or self.child.ready())


class Supervisor:
    """Starts children in the given order, restarts those that die, stops them in reverse order.

    A child that dies is started again after a delay that doubles from 0.1 s to 5 s; living for ten
    seconds resets it. The ``prepare`` of a child may raise on ``start``, which then starts nothing
    further (call ``stop``); later it is logged and tried again if it is an OSError.
    """

    def __init__(self, children: Sequence[Child]) -> None:
        names = [child.name for child in children]
        if len(set(names)) != len(names):
            raise ValueError(f"children need names of their own: {names}")
        self._charges = [_Charge(child) for child in children]

    def start(self) -> None:
        """Starts every child; waits for none (see ``ready``)."""
        _require_main_thread()
        for charge in self._charges:
            charge.start()

    def tick(self) -> None:
        """Notices deaths and starts what is due. Never blocks: call it a few times a second."""
        _require_main_thread()
        for charge in self._charges:
            charge.tick()

    def ready(self) -> bool:
        """Whether every child runs and says that it is ready."""
        return all(charge.ready() for charge in self._charges)

    def pids(self) -> dict[str, int]:
        """The pids of the running children by name."""
        return {
            charge.child.name: charge.process.pid
            for charge in self._charges
            if charge.process is not None and charge.process.poll() is None
        }

    def dismiss(self, prefix: str) -> None:
        """Tell children whose names begin so to end, and start them no more; ``stop`` waits."""
        for charge in self._charges:
            if charge.child.name.startswith(prefix):
                charge.dismiss()

    def stop(self, deadline: float) -> None:
        """Ends all children in reverse order, within ``deadline`` seconds altogether.

        Each gets SIGTERM once those after it have ended, so that a server outlives its clients; at
        the deadline whatever still runs gets SIGKILL, with its process group.
        """
        end = time.monotonic() + deadline
        for charge in reversed(self._charges):
            charge.stop(end - time.monotonic())


def stop_process(process: subprocess.Popen[bytes], seconds: float, name: str) -> int:
    """SIGTERM, then SIGKILL to its whole group after ``seconds``; its exit status."""
    if process.poll() is None:
        process.terminate()
    return _await_end(process, seconds, name)


def _await_end(process: subprocess.Popen[bytes], seconds: float, name: str) -> int:
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
    if process.poll() is None:
        log.warning("%s (pid %d) did not end in time and is killed", name, process.pid)
    kill_group(process.pid)
    status = process.wait()
    log.info("%s (pid %d) ended with %s", name, process.pid, describe(status))
    return status


def kill_group(group: int) -> None:
    """SIGKILL to whatever is left of a process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def describe(status: int) -> str:
    """An exit status in words, as Popen gives it (negative: a signal)."""
    if status >= 0:
        return f"status {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"


def _require_main_thread() -> None:
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "Supervisor must start children from the main thread: a tethered child dies with the"
            " thread that spawned it"
        )
