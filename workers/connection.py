"""Connections to Redis that live through its restart."""

from __future__ import annotations

import math

import redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import AuthenticationError, RedisError
from redis.retry import Retry

from registry.errors import InvalidRequest, Unavailable
from registry.waiting import wait_for

_FIRST_WAITS = 6  # retries until the backoff reaches its cap of a second


def connect(url: str, *, patience: float = 40.0, timeout: float = 15.0) -> redis.Redis:
    """A client of the Redis at ``url`` (redis://, rediss:// or unix://).

    A command whose server is away is tried again with an exponential backoff of at most a second.
    A retried command may have run already: what is not idempotent must bear that.

    Args:
        url: the server's URL.
        patience: about how many seconds an outage is waited out before ConnectionError is raised;
            0 tries once.
        timeout: seconds that one answer may take.
    """
    retries = math.ceil(patience) + _FIRST_WAITS if patience > 0 else 0
    try:
        client: redis.Redis = redis.Redis.from_url(
            url,
            retry=Retry(ExponentialBackoff(cap=1.0), retries),
            socket_timeout=timeout,
            socket_connect_timeout=min(timeout, 5.0),
        )
    except ValueError as error:
        raise Unavailable(f"REDIS_URL is not a Redis URL: {error}") from error
    return client


def wait_for_queue(url: str, seconds: float) -> None:
    """Wait until the Redis at ``url`` answers.

    Raises:
        Unavailable: it did not for so many seconds.
        InvalidRequest: it does, and does not let this service in.
    """
    client = connect(url, patience=0, timeout=5.0)
    name = f"the queue at REDIS_URL ({client.get_connection_kwargs().get('host', 'a Unix socket')})"

    def answers() -> None:
        try:
            client.ping()
        except AuthenticationError as error:
            raise _refused(name, error) from error
        except (redis.ConnectionError, redis.TimeoutError) as error:
            raise Unavailable(f"{name} does not answer: {error}") from error
        except RedisError as error:
            raise _refused(name, error) from error

    try:
        wait_for(name, answers, seconds)
    finally:
        client.close()


def _refused(name: str, error: RedisError) -> InvalidRequest:
    return InvalidRequest(
        f"{name} refuses this service: {error}; put user and password right in"
        " REDIS_URL (redis://USER:PASSWORD@HOST:PORT/0)",
        param="REDIS_URL",
    )
