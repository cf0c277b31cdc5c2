"""What every test finds: one thread of torch, a service and a PostgreSQL for those that ask.

``pytest --stack many`` runs the service on servers (PostgreSQL, Redis, S3), as many machines do,
where it has all it needs in one folder otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import settings

from tests.servers import PostgresServer, RedisServer, S3Server
from tests.service import Service

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two cores: tests, engine and worker share them
settings.register_profile("errata", deadline=None)  # how long an example takes is the machine's
settings.load_profile("errata")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stack", choices=("one", "many"), default="one", help="What serves tests.")


@pytest.fixture(scope="session")
def service(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Service]:
    """A real service, shared by the tests that leave the endpoint ``atlas`` as it was.

    It may deliver to webhooks on this machine.
    """
    folder = tmp_path_factory.mktemp("service")
    own = {"ERRATA_WEBHOOK_HTTP": "true", "ERRATA_WEBHOOK_ALLOW": "127.0.0.1"}
    with ExitStack() as stack:
        if request.config.getoption("--stack") == "many":
            postgres: PostgresServer = request.getfixturevalue("postgres")
            s3 = stack.enter_context(S3Server(tmp_path_factory.mktemp("s3")))
            os.environ.update(s3.environment)  # for what tests put there themselves
            own |= {
                "ERRATA_DATABASE_URL": postgres.url(postgres.new_database()),
                "ERRATA_ARTIFACTS": s3.url,
                "REDIS_URL": stack.enter_context(RedisServer()).url(),
            }
        yield stack.enter_context(Service(folder, **own))


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A real PostgreSQL, shared by tests that take a database of their own."""
    with PostgresServer() as server:
        yield server
