"""Curves hold every step once, as it was measured last."""

from __future__ import annotations

import math

from registry import attempts
from registry.curves import as_csv, curves, first_measured
from registry.database import Database
from registry.files import result_file_id
from registry.jobs import add_event, all_events, submit_job
from registry.manifests import Progress
from tests.unit.registry.conftest import TENANT
from tests.unit.registry.test_jobs import begin, submit


def test_curves_of_a_job(database: Database) -> None:
    with database.write() as connection:
        job = submit_job(connection, TENANT, "fine_tune", base="atlas", request={}, actor="me")
        for step, loss in [(1, 3.0), (2, 2.0), (3, 9.0), (2, 2.5), (3, 1.5)]:
            data = {"done": step, "total": 3, "message": "", "metrics": {"train_loss": loss}}
            add_event(connection, job.id, "progress", data)
        add_event(connection, job.id, "progress", {"done": 3, "total": 3, "metrics": {}})
        other = {"done": 2, "total": 3, "metrics": {"train_loss": 2.5, "valid_loss": 4.0}}
        add_event(connection, job.id, "progress", other)
    with database.read() as connection:
        steps = curves(connection, job.id)
    assert list(steps) == [1, 2, 3]
    assert as_csv(steps).decode().splitlines() == [
        "step,train_loss,valid_loss",
        "1,3.0,",
        "2,2.5,4.0",
        "3,1.5,",
    ]
    assert result_file_id(job.id).startswith("file-")


def test_an_attempts_first_step_is_its_own(database: Database) -> None:
    job = submit(database, None)
    for attempt, before in ((1, 0), (2, 5)):
        claim = begin(database, job, attempt)
        with database.write() as connection:
            for progress in (Progress(0, 0, "measuring before"), Progress(7, 9, "row 7 of 9")):
                attempts.record_progress(connection, claim, progress)
            assert first_measured(connection, job.id) is None
            for step in (before + 1, before + 2):
                metrics = {"train_loss": math.nan}
                attempts.record_progress(connection, claim, Progress(step, 9, "", metrics))
            found = first_measured(connection, job.id)
            attempts.release(connection, job.id, attempt, max_attempts=5)
        assert found is not None
        assert found.data["done"] == before + 1


def test_all_events_come_in_order_however_many(database: Database) -> None:
    with database.write() as connection:
        job = submit_job(connection, TENANT, "fine_tune", base="atlas", request={}, actor="me")
        for place in range(1200):
            add_event(connection, job.id, "message", {"message": str(place)})
    with database.read() as connection:
        found = [event.data.get("message") for event in all_events(connection, job.id)]
    assert found[1:] == [str(place) for place in range(1200)]
