"""What the tests of several packages need."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.database import Database


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """An SQLite with the schema and nothing in it."""
    database = Database(f"sqlite:///{tmp_path / 'registry.db'}")
    database.migrate()
    yield database
    database.close()
