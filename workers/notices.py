"""Notices that endpoints moved, said on Redis to every replica.

They carry nothing, since SQL is the truth: who hears one looks there. One that is lost costs its
hearers the time until they look by themselves.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

from redis.asyncio import Redis
from redis.exceptions import RedisError

from workers.connection import connect

logger = logging.getLogger("errata.notices")
CHANNEL = "errata:moves"
#: Seconds that publishing may take, and between tries to hear again.
PATIENCE = 0.5


class Notices:
    """Publishes and hears notices on the Redis at ``url``."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._redis = connect(url, patience=0, timeout=PATIENCE)

    def publish(self) -> None:
        """Say that endpoints moved, once the move is committed. Never raises RedisError."""
        try:
            self._redis.publish(CHANNEL, b"")
        except RedisError as error:
            logger.info("a move could not be published: %s", error)

    async def heard(self) -> AsyncIterator[None]:
        """A None for each notice, through every outage of Redis."""
        while True:
            try:
                async with Redis.from_url(self._url) as client, client.pubsub() as channel:
                    await channel.subscribe(CHANNEL)
                    async for message in channel.listen():
                        if message["type"] == "message":
                            yield
            except RedisError as error:
                logger.info("no notices are heard: %s", error)
            await asyncio.sleep(PATIENCE)
