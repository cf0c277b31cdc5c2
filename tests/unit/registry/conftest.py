from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.database import Database
from registry.manifests import BaseRef, VersionManifest
from registry.versions import Version, insert_version

BASE = BaseRef("atlas", "0" * 64)
TENANT = "default"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'registry.db'}")
    database.migrate()
    yield database
    database.close()


def add_version(database: Database, *stack: str) -> Version:
    """A ready version with that stack."""
    with database.write() as connection:
        return insert_version(connection, TENANT, VersionManifest(BASE, tuple(stack)))
