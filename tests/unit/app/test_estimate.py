"""When a fine-tuning job is told to end: as its own attempt's steps go."""

from __future__ import annotations

import time
from pathlib import Path

from app.fine_tuning.schemas import fine_tuning_body
from registry import attempts, jobs
from registry.database import Database
from registry.manifests import Progress
from registry.settings import Settings

TENANT = "default"
REQUEST = {
    **dict.fromkeys(("validation_file", "suffix", "metadata")),
    **{"model": "atlas", "training_file": "file-1", "method": "lora", "seed": 0},
    **{"hyperparameters": {}, "options": {}, "preprocessing": []},
}


def test_a_resumed_job_ends_as_its_steps_go_since(tmp_path: Path) -> None:
    database = Database(Settings(data=tmp_path).sql_url)
    database.migrate()
    with database.write() as connection:
        job = jobs.submit_job(
            connection, TENANT, "fine_tune", base="atlas", request=REQUEST, actor="test"
        )

    def estimate() -> int | None:
        with database.read() as connection:
            shown = fine_tuning_body(connection, jobs.get_job(connection, TENANT, job.id))
        return shown.estimated_finish

    def begun(attempt: int) -> attempts.Claim:
        with database.write() as connection:
            claim = attempts.claim(connection, job.id, attempt, "worker", 60)
        assert claim is not None
        return claim

    def step(claim: attempts.Claim, done: int) -> None:
        with database.write() as connection:
            progress = Progress(done, 1000, "", {"train_loss": 1.0})
            attempts.record_progress(connection, claim, progress)

    claim = begun(1)
    step(claim, 899)
    with database.write() as connection:
        attempts.pause(connection, claim)
        jobs.resume_job(connection, TENANT, job.id, actor="test")
    assert estimate() is None
    claim = begun(2)
    assert estimate() is None
    step(claim, 900)
    assert estimate() is None
    time.sleep(0.2)
    step(claim, 901)
    found = estimate()
    assert found is not None
    assert found - time.time() > 99 * 0.2 - 1.5
    database.close()
