"""What a job measured at its steps, from its events: the curves of a training run."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from sqlalchemy import Connection

from registry.jobs import all_events

#: What people upload is never of this purpose.
PURPOSE = "fine-tune-results"


def curves(connection: Connection, job_id: str) -> dict[int, Mapping[str, float]]:
    """By step what was measured there; of a step that was taken again, the last time."""
    found: dict[int, Mapping[str, float]] = {}
    for event in all_events(connection, job_id):
        if event.type == "progress" and event.data.get("metrics"):
            found[event.data["done"]] = event.data["metrics"]
    return dict(sorted(found.items()))


def as_csv(steps: Mapping[int, Mapping[str, float]]) -> bytes:
    """A line for each step; a column for each name, empty where it was not measured."""
    names: Sequence[str] = list(dict.fromkeys(name for row in steps.values() for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, ["step", *names], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"step": step, **row} for step, row in steps.items())
    return text.getvalue().encode()
