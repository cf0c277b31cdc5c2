import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.database import Database
from registry.manifests import BaseRef, VersionManifest
from registry.versions import Version, insert_version
from tests.servers import PostgresServer, S3Server

BASE = BaseRef("atlas", "0" * 64)
TENANT = "default"


@pytest.fixture(scope="session")
def migrated(postgres: PostgresServer) -> str:
    """The name of a database with the schema, to copy."""
    name = postgres.new_database()
    database = Database(postgres.url(name))
    database.migrate()
    database.close()
    return name


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """With the schema and nothing in it: the tests here run on each kind."""
    if request.param == "sqlite":
        database = Database(f"sqlite:///{tmp_path / 'registry.db'}")
        database.migrate()
        yield database
        database.close()
        return
    postgres: PostgresServer = request.getfixturevalue("postgres")
    name = postgres.new_database(request.getfixturevalue("migrated"))
    database = Database(postgres.url(name))
    yield database
    database.close()
    postgres.drop(name)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """An S3 server that this process's environment names, with a bucket that is empty."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    shutil.rmtree(s3_server.bucket)
    s3_server.bucket.mkdir()
    return s3_server


def add_version(database: Database, *stack: str) -> Version:
    """A ready version with that stack."""
    with database.write() as connection:
        return insert_version(connection, TENANT, VersionManifest(BASE, tuple(stack)))
