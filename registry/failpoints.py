"""Named points at which a process can be held, so that a test strikes it exactly there.

Where ``ERRATA_FAILPOINTS`` does not name a folder, as everywhere but in tests/faults, a point costs
one comparison. A file of that folder with a point's name arms it; the number in it says how many
times the point is passed before a thread is held there, in whatever process. The file's name then
becomes ``<point>.<pid>``, and the thread goes on once that file is gone. It is no setting: nothing
but a test has a use for it.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import Literal

Point = Literal[
    "submit-commit",  # a job is written and the transaction not committed
    "submit-committed",  # a job is acknowledged in SQL and neither queued nor answered
    "enqueued",  # an attempt is on the queue, which SQL does not know yet
    "claimed",  # a work-horse has an attempt and its lease, and has done nothing
    "progress",  # in the middle of the work
    "artifact",  # an artifact's bytes are on the disk, under no name yet
    "made",  # the work is done, its artifacts are stored, no row tells of them
    "finish-commit",  # version, report, end and move are written and not committed
    "finished",  # they are committed, and nobody has heard
    "loading",  # the engine reads a version that it is to serve
    "warming",  # an API has seen a move, and its engine not
    "move-commit",  # an endpoint's move by REST is written and not committed
    "moved",  # it is committed, neither published nor answered
]
_FOLDER = os.environ.get("ERRATA_FAILPOINTS")
_LOOK_SECONDS = 0.01


def reach(point: Point) -> None:
    """Be held here, if a test has armed the point."""
    if _FOLDER is not None:
        _hold(Path(_FOLDER) / point)


def _hold(armed: Path) -> None:
    held = armed.with_name(f"{armed.name}.{os.getpid()}")
    try:
        with armed.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            passes = int(file.read())
            if passes:
                file.seek(0)
                file.write(str(passes - 1))
                file.truncate()
                return
            armed.rename(held)
    except FileNotFoundError:  # not armed, or somebody else is held
        return
    while held.exists():
        time.sleep(_LOOK_SECONDS)
