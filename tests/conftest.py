"""What every test finds: one thread of torch, a service and a PostgreSQL for those that ask."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.servers import PostgresServer
from tests.service import Service

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two cores: tests, engine and worker share them


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A real service, shared by the tests that leave the endpoint ``atlas`` as it was.

    It may deliver to webhooks on this machine.
    """
    folder = tmp_path_factory.mktemp("service")
    own = {"ERRATA_WEBHOOK_HTTP": "true", "ERRATA_WEBHOOK_ALLOW": "127.0.0.1"}
    with Service(folder, **own) as service:
        yield service


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A real PostgreSQL, shared by tests that take a database of their own."""
    with PostgresServer() as server:
        yield server
