"""What an attempt reports: every measurement is kept, though it is written a few times a second."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from editing.finetune.catalogue import TUNINGS
from editing.finetune.memory import plan
from editing.finetune.rows import TrainingRow
from editing.models import ModelView
from editing.models.loading import load_model, load_tokenizer
from registry import attempts, jobs
from registry.artifacts import ArtifactStore
from registry.bases import find_bases
from registry.curves import curves
from registry.database import Database
from registry.errors import JobFailed, Unavailable, UnsupportedModel, VersionUnavailable
from registry.jobs import all_events
from registry.manifests import BaseRef, Progress, VersionManifest
from registry.settings import Settings
from registry.versions import insert_version
from tests.proxy import Proxy
from tests.servers import PostgresServer
from tests.unit.workers.conftest import until
from workers.kinds.fine_tune import _planned
from workers.run import _ending
from workers.work import Cancelled, LoadedBases, Paused, Work

TENANT = "default"


def work_on(database: Database, tmp_path: Path) -> Work:
    with database.write() as connection:
        base = VersionManifest(BaseRef("atlas", "0" * 64))
        parent = insert_version(connection, TENANT, base)
        job = jobs.submit_job(
            connection, TENANT, "fine_tune", base="atlas", request={}, actor="me", parent=parent.id
        )
        claim = attempts.claim(connection, job.id, 1, "worker", 60)
    assert claim is not None
    settings = Settings(data=tmp_path, lease_seconds=0.4)
    store = ArtifactStore(tmp_path / "artifacts")
    return Work(claim, settings, database, store, LoadedBases({}, "float32"))


@pytest.fixture
def work(database: Database, tmp_path: Path) -> Work:
    return work_on(database, tmp_path)


def step(number: int) -> Progress:
    return Progress(number, 50, f"step {number}", {"train_loss": 1 / number})


def test_steps_wait_and_are_all_kept(work: Work, database: Database) -> None:
    for number in range(1, 21):
        work.report(step(number))
        work.report(Progress(number, 50, "between"))
    with database.read() as connection:
        assert len(curves(connection, work.claim.job.id)) < 20
    work.write_progress()
    with database.read() as connection:
        steps = curves(connection, work.claim.job.id)
        told = [event.data.get("message") for event in all_events(connection, work.claim.job.id)]
        assert jobs.get_job(connection, TENANT, work.claim.job.id).done == 20
    assert {number: row["train_loss"] for number, row in steps.items()} == {
        number: 1 / number for number in range(1, 21)
    }
    assert told.count("between") < 20


def test_what_was_measured_before_a_pause_is_kept(work: Work, database: Database) -> None:
    with work:
        work.report(step(1))
        with database.write() as connection:
            jobs.pause_job(connection, TENANT, work.claim.job.id, actor="ada")
        until(work._paused.is_set)
        with pytest.raises(Paused):
            work.report(step(2))
    with database.read() as connection:
        assert list(curves(connection, work.claim.job.id)) == [1, 2]


@pytest.mark.parametrize("arrives", [False, True])
def test_steps_whose_commit_was_not_answered_are_kept_once(
    postgres: PostgresServer, tmp_path: Path, arrives: bool
) -> None:
    name = postgres.new_database()
    with Proxy(postgres.folder) as proxy:
        database = Database(postgres.url(name, proxy.folder))
        database.migrate()
        work = work_on(database, tmp_path)
        cut = proxy.cut(b"COMMIT", after=b"INSERT INTO events", arrives=arrives)
        work.report(step(1))
        assert cut.done.is_set()
        work.report(step(2))
        work.write_progress()
        with database.read() as connection:
            events = list(all_events(connection, work.claim.job.id))
        database.close()
        assert [event.data["done"] for event in events if event.type == "progress"] == [1, 2]


@pytest.mark.parametrize(
    ("error", "status", "outcome"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "queued", "interrupted"),
        (Unavailable("the database does not answer"), "queued", "interrupted"),
        (PermissionError(errno.EACCES, "Permission denied"), "failed", "failed"),
        (VersionUnavailable("no such delta"), "failed", "failed"),
        (JobFailed("no"), "failed", "failed"),
        (Cancelled(), "cancelled", "cancelled"),
        (Paused(), "paused", "paused"),
    ],
)
def test_how_an_attempt_ends(
    work: Work, database: Database, error: Exception, status: str, outcome: str
) -> None:
    with work:
        database.insist(_ending(work, error), 0)
    with database.read() as connection:
        job = jobs.get_job(connection, TENANT, work.claim.job.id)
        (attempt,) = attempts.attempts(connection, job.id)
    assert (job.status, attempt["outcome"]) == (status, outcome)


def test_every_attempt_keeps_to_the_first_one_s_plan(work: Work, database: Database) -> None:
    base = find_bases("atlas")["atlas"]
    view = ModelView(load_model(base), load_tokenizer(base), base)
    entry = TUNINGS["lora"]
    chosen = entry.hyperparameters(r=4).settled(2)
    assert chosen.max_tokens == "auto"
    adapter = entry.build(view, chosen, 0)
    rows = [TrainingRow(list(range(n)), range(1, n)) for n in (8, 500)]
    first = _planned(work, view, adapter, rows, chosen)
    with pytest.raises(JobFailed, match="500 tokens"):
        plan(view, adapter, rows, 4, None, 2**20)
    poor = work.settings.model_copy(update={"training_memory": 2**20})
    later = Work(work.claim, poor, database, work.artifacts, work.models)
    assert _planned(later, view, adapter, rows, chosen) == first
    with database.read() as connection:
        told = [event.data.get("message") for event in all_events(connection, work.claim.job.id)]
    assert told.count(f"flat rows of up to {first.tokens} tokens") == 1


def test_a_worker_refuses_a_gpu_that_is_not_there_by_name() -> None:
    device = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(UnsupportedModel, match=f"ERRATA_DEVICE={device}.*no GPU"):
        LoadedBases(find_bases("atlas"), "float32", device).preload()
