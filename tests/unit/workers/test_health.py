import logging

import pytest
import redis

from registry.errors import Unavailable
from registry.settings import Settings
from tests.unit.workers.conftest import Workplace
from workers.health import check


def test_a_worker_of_this_host_is_looked_for(connection: redis.Redis, workplace: Workplace) -> None:
    settings = Settings(redis_url=workplace.url)
    with pytest.raises(Unavailable, match=r"no worker of .* is known"):
        check(settings)
    workplace.work()
    check(settings)


def test_a_queue_that_is_away_says_nothing_against_the_worker(
    caplog: pytest.LogCaptureFixture,
) -> None:
    check(Settings(redis_url="redis://127.0.0.1:1"))
    (told,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "REDIS_URL does not answer" in told
