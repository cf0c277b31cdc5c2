"""What work-horses do before an attempt, and after one whose artifacts went meanwhile."""

import os
import time
from pathlib import Path

import pytest

from registry import attempts, jobs
from registry.bases import find_bases
from registry.bootstrap import DEFAULT_TENANT, bootstrap
from registry.database import Database
from registry.garbage import Collector
from registry.manifests import VersionManifest
from registry.results import Result
from workers.run import KINDS, preload, run
from workers.work import Work


def perform(work: Work) -> Result:
    """A job that is far too slow at first."""
    base = find_bases("atlas")["atlas"].ref
    manifest = VersionManifest(base, (work.artifacts.put(b"delta"),), (), {})
    if work.claim.attempt == 1:
        Collector(work.database, work.artifacts).collect(-60)
    return Result(manifest)


def test_a_version_whose_delta_was_collected_is_made_again(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERRATA_DATA", str(tmp_path))
    monkeypatch.setitem(KINDS, "edit", __name__)
    bootstrap(database, find_bases("atlas").values())
    with database.write() as connection:
        job = jobs.submit_job(
            connection, DEFAULT_TENANT, "edit", base="atlas", request={}, actor="ada"
        )
    run(job.id, 1)
    with database.read() as connection:
        assert jobs.get_job(connection, DEFAULT_TENANT, job.id).status == "queued"
        (attempt,) = attempts.attempts(connection, job.id)
    assert attempt["outcome"] == "interrupted"
    run(job.id, 2)
    with database.read() as connection:
        ended = jobs.get_job(connection, DEFAULT_TENANT, job.id)
    assert (ended.status, bool(ended.version_id)) == ("succeeded", True)


def test_what_a_killed_work_horse_left_goes_before_the_next_one_s_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mount").mkdir()
    monkeypatch.setenv("ERRATA_DATA", str(tmp_path))
    monkeypatch.setenv("ERRATA_ARTIFACTS", f"file://{tmp_path / 'mount'}")
    monkeypatch.setenv("ERRATA_GC_GRACE_SECONDS", "100")
    old, fresh = (tmp_path / "cache" / name for name in (".tmp-old", ".tmp-fresh"))
    for folder in (old, fresh):
        folder.mkdir(parents=True)
        (folder / "archive").write_bytes(b"half")
    for path in (old / "archive", old):
        os.utime(path, (time.time() - 200,) * 2)
    preload()
    assert [*(tmp_path / "cache").iterdir()] == [fresh]
