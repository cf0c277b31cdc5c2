"""What a job measured at its steps, from its events: the curves of a training run."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, func, select

from registry import tables
from registry.jobs import Event, all_events, to_event

#: What people upload is never of this purpose.
PURPOSE = "fine-tune-results"


#: Of a step; None: it was not finite.
Measured = Mapping[str, float | None]


def curves(connection: Connection, job_id: str) -> dict[int, Measured]:
    """By step what was measured there; of a step that was taken again, the last time."""
    found: dict[int, Measured] = {}
    for event in all_events(connection, job_id):
        if event.type == "progress" and event.data.get("metrics"):
            found[event.data["done"]] = event.data["metrics"]
    return dict(sorted(found.items()))


def first_measured(connection: Connection, job_id: str) -> Event | None:
    """Of a running job, the first step that the attempt which runs has measured."""
    table = tables.events
    own = table.c.job_id == job_id
    begun = select(func.max(table.c.seq)).where(own, table.c.type == "status").scalar_subquery()
    measured = table.c.data["metrics"].as_string() != "{}"
    row = connection.execute(
        select(table)
        .where(own, table.c.seq > begun, table.c.type == "progress", measured)
        .order_by(table.c.seq)
        .limit(1)
    ).one_or_none()
    return None if row is None else to_event(row)


def as_csv(steps: Mapping[int, Measured]) -> bytes:
    """A line for each step; a column for each name, empty where it was not measured or not
    finite."""
    names: Sequence[str] = list(dict.fromkeys(name for row in steps.values() for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, ["step", *names], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"step": step, **row} for step, row in steps.items())
    return text.getvalue().encode()
