"""What the running service says where its artifacts are another registry's."""

import asyncio
from pathlib import Path

import pytest

from app.main import collect_garbage
from registry.artifacts import ArtifactStore, Swept
from registry.database import Database
from registry.garbage import Collector


class Counted(Collector):
    """Counts its collections."""

    count = 0

    def collect(self, grace: float, *, dry_run: bool = False, adopt: bool = False) -> Swept:
        self.count += 1
        return super().collect(grace, dry_run=dry_run, adopt=adopt)


async def several(collector: Counted) -> None:
    works = asyncio.create_task(collect_garbage(collector, 0.01))
    while collector.count < 4:
        await asyncio.sleep(0.01)
    works.cancel()
    await asyncio.wait([works])


def test_a_store_of_another_registry_is_told_once(
    database: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    store.claim("reg_another")
    collector = Counted(database, store)
    asyncio.run(several(collector))
    (told,) = [record.getMessage() for record in caplog.records if "garbage" in record.message]
    assert f"{tmp_path / 'artifacts'} are those of registry reg_another" in told
