from collections.abc import Iterator
from pathlib import Path

import pytest

from app.limits import Limiter
from app.services import Services
from registry.artifacts import ArtifactStore
from registry.database import Database
from registry.settings import Settings
from serving.client import EngineClient
from workers.connection import connect
from workers.dispatch import Dispatcher
from workers.notices import Notices

AWAY = "redis://127.0.0.1:1"


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    """Of which only the database and the artifacts are there."""
    settings = Settings(data=tmp_path)
    database, queue = Database(settings.sql_url), connect(AWAY, patience=0)
    database.migrate()
    yield Services(
        settings=settings,
        bases={},
        database=database,
        artifacts=ArtifactStore(tmp_path / "artifacts"),
        engine=EngineClient(tmp_path / "e"),
        dispatcher=Dispatcher(database, queue, settings, quick=queue),
        notices=Notices(AWAY),
        limiter=Limiter(AWAY),
    )
    database.close()
