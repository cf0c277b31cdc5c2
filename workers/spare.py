"""Work-horses seen from their worker: fresh interpreters, preloaded ahead, that do one job each."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from workers.supervisor import describe, kill_group

log = logging.getLogger(__name__)

READY = b"ready\n"
_ROOT = Path(__file__).resolve().parent.parent
_REAP_SECONDS = 0.25
_FIRST_DELAY = 0.1
_LONGEST_DELAY = 5.0
_USUAL_SECONDS = 60.0  # in which a work-horse has preloaded


class WorkHorse:
    """One ``python -m workers.horse``, tethered to this process, in its own process group.

    Start it on the main thread (see workers.tether).

    Args:
        preload: ``module:function`` that it calls before it says that it is ready.
        target: the one function (dotted) that it may run.
        environment: variables added to this process's own.
    """

    def __init__(self, preload: str, target: str, environment: Mapping[str, str]) -> None:
        self._pipe, theirs = os.pipe()
        os.set_blocking(self._pipe, False)
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "workers.horse"]
        try:
            self._process = subprocess.Popen(
                [*command, str(os.getpid()), str(theirs), preload, target],
                env={**os.environ, "PYTHONPATH": path, **environment},
                stdin=subprocess.PIPE,
                pass_fds=(theirs,),
                process_group=0,
            )
        except OSError:
            os.close(self._pipe)
            raise
        finally:
            os.close(theirs)
        self._said = b""
        self._pipe_open = True

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ready(self) -> bool:
        """Whether it has preloaded, as far as ``wait`` has listened."""
        return self._said.endswith(READY)

    def wait(self, seconds: float) -> int | None:
        """Waits until it says something or ends; its exit status once it has ended."""
        end = time.monotonic() + seconds
        if self._pipe_open:
            if select.select([self._pipe], [], [], seconds)[0]:
                said = os.read(self._pipe, 1024)
                self._said += said
                self._pipe_open = bool(said)
            if self._pipe_open:
                return self._process.poll()
        with contextlib.suppress(subprocess.TimeoutExpired):  # its pipe is closed: it is ending
            return self._process.wait(min(_REAP_SECONDS, max(0.0, end - time.monotonic())))
        return None

    @property
    def stands_still(self) -> bool:
        """Whether it is stopped, by SIGSTOP or a debugger, as far as the system tells."""
        if not hasattr(os, "waitid"):
            return False
        with contextlib.suppress(ChildProcessError):
            flags = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self.pid, flags) is not None
        return False

    def hand(self, order: Mapping[str, str | int]) -> None:
        """Gives it its one job; BrokenPipeError if it has died."""
        stdin = self._process.stdin
        if stdin is None:
            raise BrokenPipeError(f"work-horse {self.pid} has no stdin")
        stdin.write(json.dumps(order).encode() + b"\n")
        stdin.close()

    def kill(self) -> None:
        """SIGKILL to it and to whatever it started in its group; ``wait`` then tells its status."""
        if self._process.returncode is None:
            kill_group(self.pid)

    def close(self) -> int:
        """Ends it if it still runs and frees what it held; its exit status."""
        kill_group(self.pid)
        status = self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        os.close(self._pipe)
        return status


class Spare:
    """Keeps one work-horse ahead of need; one that died gets a successor after a growing delay."""

    def __init__(self, new_horse: Callable[[], WorkHorse]) -> None:
        self._new_horse = new_horse
        self._horse: WorkHorse | None = None
        self._due = 0.0
        self._begun = 0.0
        self._failures = 0
        self._taken = 0

    @property
    def ready(self) -> bool:
        """Whether a preloaded work-horse stands by, as far as ``keep`` and ``wait`` have seen."""
        return self._horse is not None and self._horse.ready

    @property
    def expected(self) -> bool:
        """Whether one stands by or should soon, as others did before it."""
        if self._horse is None or self._horse.ready:
            return self.ready
        is_late = time.monotonic() - self._begun > _USUAL_SECONDS
        return self._taken > 0 and not self._failures and not is_late

    def keep(self) -> None:
        """Starts a work-horse where there is none."""
        status = self._horse.wait(0.0) if self._horse is not None else None
        if self._horse is not None and status is not None:
            self._failures = 0 if self._horse.ready else self._failures + 1
            delay = min(_LONGEST_DELAY, _FIRST_DELAY * 2**self._failures)
            log.error(
                "the spare work-horse %d ended with %s; the next one starts in %.1f s",
                self._horse.pid,
                describe(status),
                delay,
            )
            self._due = time.monotonic() + delay
            self.close()
        if self._horse is None and time.monotonic() >= self._due:
            self._horse = self._new_horse()
            self._begun = time.monotonic()

    def wait(self, seconds: float) -> None:
        """Waits for the spare to be ready, or until it is time to ``keep`` again."""
        if self._horse is not None:
            self._horse.wait(seconds)
        else:
            time.sleep(min(seconds, max(0.0, self._due - time.monotonic())))

    def take(self) -> WorkHorse | None:
        """Hands over the work-horse, which is the taker's to close; None if there is none."""
        horse, self._horse = self._horse, None
        self._failures = 0
        self._taken += horse is not None
        return horse

    def close(self) -> None:
        """Ends the work-horse that stands by."""
        if self._horse is not None:
            self._horse.close()
            self._horse = None
