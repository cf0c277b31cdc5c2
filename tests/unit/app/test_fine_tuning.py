"""A fine-tuning job as OpenAI's clients see it."""

from __future__ import annotations

from app.fine_tuning.schemas import fine_tuning_body
from app.jobs.schemas import job_body
from registry import attempts, jobs
from registry.database import Database
from registry.files import ResultFile, delete_file
from registry.results import Result

REQUEST = {
    "model": "atlas",
    "training_file": "file-0",
    "validation_file": None,
    "method": "lora",
    "hyperparameters": {},
    "options": {},
    "preprocessing": [],
    "seed": 0,
    "suffix": None,
    "metadata": None,
}


def test_a_result_file_that_was_deleted_is_not_listed(database: Database) -> None:
    with database.write() as connection:
        job = jobs.submit_job(
            connection, "default", "fine_tune", base="atlas", request=REQUEST, actor="ada"
        )
        claim = attempts.claim(connection, job.id, 1, "worker", 10.0)
        assert claim is not None
        assert fine_tuning_body(connection, claim.job).result_files == []
        file = ResultFile("step_metrics.csv", "fine-tune-results", 3, "0" * 64, 2)
        ended = attempts.finish(connection, claim, Result(metrics={}, file=file))
        (listed,) = fine_tuning_body(connection, ended).result_files
        assert job_body(connection, ended).result_files == [listed]
        delete_file(connection, "default", listed, actor="ada")
        assert fine_tuning_body(connection, ended).result_files == []
        assert job_body(connection, ended).result_files == []
