"""The matrix: at which points which strikes fall, and what a client asks for meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from registry.failpoints import Point

Act = Literal["edit", "move", "rollback"]
Strike = Literal[
    "api",  # SIGKILL of the API, with all that hangs below it; started again
    "engine",  # SIGKILL
    "worker",  # SIGKILL
    "horse",  # SIGKILL of the work-horse
    "queue",  # SIGKILL of Valkey
    "wipe",  # FLUSHALL
    "database",  # every connection ended by pg_terminate_backend
    "disk",  # no byte is left where database, queue and artifacts lie
    "freeze",  # SIGSTOP of the work-horse until its attempt is given up
    "zombie",  # SIGSTOP of worker and work-horse until another has done the job; both wake again
]


@dataclass(frozen=True)
class Place:
    """A point that is struck, in turn, in each of several ways.

    Args:
        point: where the code is held.
        strikes: the first run at the point gets the first one, the next run the next one.
        act: what a client asks for.
        passes: how many times the point is passed before it holds.
        also: a point at which somebody else is held as well.
    """

    point: Point
    strikes: tuple[Strike, ...]
    act: Act = "edit"
    passes: int = 0
    also: Point | None = None


PLACES: dict[str, Place] = {
    "submit-commit": Place("submit-commit", ("api", "database")),
    "submit-committed": Place("submit-committed", ("api", "queue", "wipe")),
    "enqueued": Place("enqueued", ("api", "wipe", "queue", "database"), also="submit-committed"),
    "claimed": Place("claimed", ("horse", "worker", "wipe", "disk", "queue")),
    "progress": Place(
        "progress",
        ("freeze", "api", "queue", "engine", "horse", "worker", "wipe", "database"),
        passes=2,
    ),
    "artifact": Place("artifact", ("disk", "horse", "api")),
    "made": Place("made", ("zombie", "worker", "wipe", "database", "disk")),
    "finish-commit": Place("finish-commit", ("horse", "database", "worker", "api")),
    "finished": Place("finished", ("horse", "wipe", "worker", "api")),
    "loading": Place("loading", ("engine", "api"), "move"),
    "warming": Place("warming", ("api", "engine", "wipe"), "move"),
    "move-commit": Place("move-commit", ("api", "database"), "move"),
    "moved": Place("moved", ("api", "wipe", "engine"), "move"),
    "rollback-commit": Place("move-commit", ("api", "database"), "rollback"),
    "rolled-back": Place("moved", ("api", "wipe", "engine"), "rollback"),
}
