"""Pausing, and what training goes on from: written by the attempt that runs, and by no other."""

from __future__ import annotations

import pytest

from registry import attempts, jobs
from registry.checkpoints import list_checkpoints, record_checkpoint
from registry.database import Database
from registry.errors import Conflict, LeaseLost
from registry.manifests import VersionManifest
from registry.versions import get_ready_version
from tests.unit.registry.conftest import BASE, TENANT
from tests.unit.registry.test_jobs import LEASE, begin, submit, waiting


def test_a_paused_job_waits_until_it_is_resumed(database: Database) -> None:
    queued = submit(database, None)
    with database.write() as connection:
        assert jobs.pause_job(connection, TENANT, queued.id, actor="ada").status == "paused"
        assert jobs.pause_job(connection, TENANT, queued.id, actor="ada").status == "paused"
    assert waiting(database) == []
    with database.write() as connection:
        assert jobs.resume_job(connection, TENANT, queued.id, actor="ada").status == "queued"
        with pytest.raises(Conflict, match="only a paused one"):
            jobs.resume_job(connection, TENANT, queued.id, actor="ada")
    claim = begin(database, queued)
    with database.write() as connection:
        assert jobs.pause_job(connection, TENANT, queued.id, actor="ada").status == "running"
        assert attempts.heartbeat(connection, claim, LEASE).pause_requested
        attempts.pause(connection, claim)
        assert jobs.get_job(connection, TENANT, queued.id).status == "paused"
        with pytest.raises(LeaseLost):
            attempts.heartbeat(connection, claim, LEASE)
        assert not jobs.resume_job(connection, TENANT, queued.id, actor="ada").pause_requested
    assert waiting(database) == [queued.id]
    with database.write() as connection:
        jobs.pause_job(connection, TENANT, queued.id, actor="ada")
        assert jobs.cancel_job(connection, TENANT, queued.id, actor="ada").status == "cancelled"
        with pytest.raises(Conflict, match="has ended"):
            jobs.pause_job(connection, TENANT, queued.id, actor="ada")


def test_a_job_that_is_to_pause_does_so_where_its_worker_dies(database: Database) -> None:
    job = submit(database, None)
    begin(database, job)
    with database.write() as connection:
        jobs.pause_job(connection, TENANT, job.id, actor="ada")
        assert attempts.release(connection, job.id, 1, max_attempts=5)
        assert jobs.get_job(connection, TENANT, job.id).status == "paused"


def test_pauses_are_no_deaths(database: Database) -> None:
    """However often a job was paused, only attempts whose worker died count against it."""
    job = submit(database, None)
    for attempt in (1, 2, 3):
        claim = begin(database, job, attempt)
        with database.write() as connection:
            attempts.pause(connection, claim)
            jobs.resume_job(connection, TENANT, job.id, actor="ada")
    begin(database, job, 4)
    with database.write() as connection:
        attempts.release(connection, job.id, 4, max_attempts=2)
        assert jobs.get_job(connection, TENANT, job.id).status == "queued"


def test_versions_stay_and_other_states_are_replaced(database: Database) -> None:
    job = submit(database, None)
    claim = begin(database, job)
    manifest = VersionManifest(BASE, ("d" * 64,), (), {"step": 2})
    with database.write() as connection:
        record_checkpoint(connection, claim, 1, "1" * 64, {})
        record_checkpoint(connection, claim, 2, "2" * 64, {"valid_loss": 0.5}, manifest)
        record_checkpoint(connection, claim, 3, "3" * 64, {})
        record_checkpoint(connection, claim, 4, "4" * 64, {})
        found = list_checkpoints(connection, job.id)
        assert [(c.step, c.version_id) for c in found] == [(2, manifest.id), (4, None)]
        assert found[0].metrics == {"valid_loss": 0.5}
        assert get_ready_version(connection, TENANT, manifest.id).job_id is None
        attempts.release(connection, job.id, 1, max_attempts=5)
    with pytest.raises(LeaseLost), database.write() as connection:
        record_checkpoint(connection, claim, 5, "5" * 64, {})
    begin(database, job, 2)
    with database.read() as connection:
        assert len(list_checkpoints(connection, job.id)) == 2
