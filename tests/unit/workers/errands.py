"""What the tests' work-horses do, and the worker that has it done: processes of their own."""

import os
import signal
import sys
import time
from pathlib import Path

from workers.pulse import Timing
from workers.worker import ErrataWorker

TARGET = "tests.unit.workers.errands.errand"


def folder() -> Path:
    """Where errands leave their traces."""
    return Path(os.environ["ERRAND_FOLDER"])


def note(name: str, *words: object) -> None:
    """Appends one line to a trace."""
    with (folder() / name).open("a") as trace:
        trace.write(" ".join(map(str, words)) + "\n")


def preload() -> None:
    """Stands for loading torch; leaves the spare's pid."""
    if (folder() / "broken").exists():
        raise RuntimeError("the preload is broken")
    while (folder() / "slow").exists():
        time.sleep(0.05)
    note("spares", os.getpid())


def errand(job_id: str, attempt: int) -> None:
    """Does what the job's id says."""
    note("begun", job_id, attempt, os.getpid(), time.time())
    match job_id.split("_")[0]:
        case "wait":
            while not (folder() / "release").exists():
                time.sleep(0.01)
        case "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(3)
        case "raise":
            raise ValueError("an errand that fails")
    note("ended", job_id, attempt, os.getpid(), time.time())


def pwn(job_id: str, attempt: int) -> None:
    """What no queue may have called."""
    note("pwned", job_id, attempt)


def lost(job_id: str, attempt: int) -> None:
    """The worker's hook."""
    note("lost", job_id, attempt, os.getpid(), time.time())
    if job_id.startswith("crash_hook"):
        raise RuntimeError("the hook is broken")


def stopped(job_id: str, attempt: int) -> None:
    """The worker's other hook."""
    note("stopped", job_id, attempt, os.getpid(), time.time())


def main() -> None:
    """A worker: ``python -m tests.unit.workers.errands <url> <lease seconds> <grace seconds>``."""
    url, lease, grace = sys.argv[1:]
    ErrataWorker(
        url,
        on_lost=lost,
        on_stopped=stopped,
        timing=Timing.for_lease(float(lease)),
        target=TARGET,
        preload="tests.unit.workers.errands:preload",
        grace=float(grace),
    ).work()


if __name__ == "__main__":
    main()
