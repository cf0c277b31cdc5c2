"""Counts over all tenants, for monitoring: what happened stands in SQL, whoever did it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, func, select

from registry import tables
from registry.attempts import LOST, dispatchable
from registry.jobs import FAILED


@dataclass(frozen=True)
class Counts:
    """What stands in SQL at one moment.

    Attributes:
        jobs: by kind and status.
        oldest_due: Unix seconds of when the oldest job was posted that nothing but a worker lacks.
        lost_attempts: attempts whose worker died.
        rejections: by guard; a version that two guards reject counts for both.
        moves: of endpoints, by kind.
    """

    jobs: Mapping[tuple[str, str], int]
    oldest_due: float | None
    lost_attempts: int
    rejections: Mapping[str, int]
    moves: Mapping[str, int]


def read_counts(connection: Connection) -> Counts:
    """Count."""
    jobs, attempts, moves = tables.jobs, tables.attempts, tables.moves
    by_kind = select(jobs.c.kind, jobs.c.status, func.count()).group_by(jobs.c.kind, jobs.c.status)
    lost = select(func.count()).where(attempts.c.outcome == LOST)
    rejected = select(jobs.c.guards).where(
        jobs.c.status == FAILED, jobs.c.reason == "guard_rejected"
    )
    by_move = select(moves.c.kind, func.count()).group_by(moves.c.kind)
    due = dispatchable(connection, limit=1)
    return Counts(
        jobs={(row[0], row[1]): row[2] for row in connection.execute(by_kind)},
        oldest_due=due[0].created_at if due else None,
        lost_attempts=connection.execute(lost).scalar_one(),
        rejections=Counter(
            guard["name"]
            for (guards,) in connection.execute(rejected)
            for guard in guards or ()
            if guard["result"] == "failed"
        ),
        moves={row[0]: row[1] for row in connection.execute(by_move)},
    )
