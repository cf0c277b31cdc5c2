"""What does not start, and says why."""

from collections.abc import Callable
from pathlib import Path

import pytest

from app.serve import serve
from registry.artifacts import ArtifactStore
from registry.database import Database
from registry.errors import Conflict, InvalidRequest
from registry.settings import Settings
from workers.worker import work


@pytest.fixture
def settings(database: Database, tmp_path: Path) -> Settings:
    """Of a registry with its schema, whose start would fail right after it looked at the store."""
    (tmp_path / "file").touch()
    return Settings(
        data=tmp_path, runtime=tmp_path / "file", redis_url="redis://127.0.0.1:1", wait_seconds=0
    )


@pytest.mark.parametrize("start", [serve, work])
def test_artifacts_of_another_registry_end_the_start(
    settings: Settings, start: Callable[[Settings], None]
) -> None:
    settings = settings.model_copy(update={"redis_url": ""}) if start is serve else settings
    store = ArtifactStore(settings.artifact_folder)
    store.claim("reg_another")
    with pytest.raises(Conflict, match=r"of registry reg_another.*`errata gc --adopt`"):
        start(settings)
    assert store.owner() == "reg_another"


@pytest.mark.parametrize("start", [serve, work])
def test_artifacts_of_nobody_are_claimed_at_the_start(
    settings: Settings, start: Callable[[Settings], None]
) -> None:
    settings = settings.model_copy(update={"redis_url": ""}) if start is serve else settings
    with pytest.raises(Exception, match=r"file|queue"):
        start(settings)
    assert (ArtifactStore(settings.artifact_folder).owner() or "").startswith("reg_")


def test_artifacts_that_cannot_be_written_end_the_start(settings: Settings) -> None:
    settings.artifact_folder.write_text("no folder")
    with pytest.raises(InvalidRequest, match=r"artifacts cannot be used .*ERRATA_DATA"):
        serve(settings.model_copy(update={"redis_url": ""}))


def test_a_worker_may_start_before_the_tables_are_made(tmp_path: Path, settings: Settings) -> None:
    early = settings.model_copy(update={"database_url": f"sqlite:///{tmp_path / 'early.db'}"})
    with pytest.raises(Exception, match="queue"):
        work(early)
    assert not settings.artifact_folder.exists()
