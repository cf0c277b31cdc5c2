"""A queue that starts late is waited for; one that lets nobody in is not."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from registry.errors import InvalidRequest, Unavailable
from tests.servers import RedisServer
from workers.connection import wait_for_queue


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer(password="secret") as server:
        yield server


def test_a_queue_that_starts_late_is_waited_for(server: RedisServer) -> None:
    server.stop()
    with pytest.raises(Unavailable, match=r"REDIS_URL .* did not answer for 0\.2 s: .*; start it"):
        wait_for_queue(server.url(), 0.2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait_for_queue, server.url(), 60)
        with pytest.raises(TimeoutError):
            waiting.result(0.6)
        server.start()
        waiting.result()


def test_a_queue_that_lets_nobody_in_is_not_waited_for(server: RedisServer) -> None:
    wait_for_queue(server.url(), 600)
    for wrong in ("", "other"):
        with pytest.raises(
            InvalidRequest, match="put user and password right in REDIS_URL"
        ) as told:
            wait_for_queue(server.url(wrong), 600)
        assert "secret" not in told.value.message
