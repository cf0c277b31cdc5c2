"""Rate limits of keys: token buckets in Redis, one for all replicas."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from redis.asyncio import Redis
from redis.exceptions import RedisError

from registry.errors import DeadlineExceeded, ErrataError, TooManyRequests
from registry.keys import Key
from serving.protocol import GenerateRequest, Piece

logger = logging.getLogger("errata.limits")
#: Seconds that Redis may take; where it does not answer, nobody is refused.
PATIENCE = 0.5
MINUTE = 60.0
#: A bucket holds a minute's worth and fills evenly. Below ``need`` nothing is taken, and the answer
#: is how many seconds it takes to fill that far. ``cost`` may empty it beyond zero: what is used is
#: known only afterwards.
BUCKET = """
local size, need, cost = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local found = redis.call('HMGET', KEYS[1], 'level', 'at')
local level = tonumber(found[1]) or size
level = math.min(size, level + math.max(0, now - (tonumber(found[2]) or now)) * size / 60)
local wait = 0
if level < need then wait = (need - level) * 60 / size else level = level - cost end
redis.call('HSET', KEYS[1], 'level', string.format('%.6f', level), 'at', string.format('%.6f', now))
redis.call('EXPIRE', KEYS[1], math.ceil(60 + math.max(0, size - level) * 60 / size))
return tostring(wait)
"""


class Limiter:
    """The buckets on the Redis at ``url``."""

    def __init__(self, url: str) -> None:
        self._redis = Redis.from_url(
            url, socket_timeout=PATIENCE, socket_connect_timeout=PATIENCE, protocol=2
        )
        self._bucket = self._redis.register_script(BUCKET)
        self._charges: set[asyncio.Task[float]] = set()

    async def admit(self, key: Key) -> None:
        """Count a request of a key.

        Raises:
            TooManyRequests: its requests of a minute are used up.
        """
        size = key.requests_per_minute
        if size is not None:
            await self._need(key, "requests", size, cost=1)

    async def admit_tokens(self, key: Key) -> None:
        """Raises TooManyRequests where the tokens of a key's minute are used up."""
        size = key.tokens_per_minute
        if size is not None:
            await self._need(key, "tokens", size, cost=0)

    async def metered(
        self,
        key: Key | None,
        requests: Sequence[GenerateRequest],
        pieces: AsyncGenerator[tuple[int, Piece], None],
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces; what they come to is taken from the key's tokens, however they end.

        A prompt counts once, whatever its samples, and by its likely length where the client did
        not wait for the first piece.
        """
        if key is None or key.tokens_per_minute is None:
            async for item in pieces:
                yield item
            return
        owners = [number for number, asked in enumerate(requests) for _ in range(asked.samples)]
        prompts: dict[int, int] = {}
        tokens, is_refused = 0, False
        try:
            async with aclosing(pieces):
                async for index, piece in pieces:
                    if piece.prompt_tokens is not None:
                        prompts[owners[index]] = piece.prompt_tokens
                    tokens += len(piece.tokens)
                    yield index, piece
        except ErrataError as error:
            is_refused = not isinstance(error, DeadlineExceeded)
            raise
        finally:
            for number, asked in enumerate(requests):
                tokens += prompts.get(number, 0 if is_refused else asked.likely_prompt_tokens)
            # In a task of its own: who hung up is charged too.
            charge = asyncio.create_task(
                self._take(key, "tokens", key.tokens_per_minute, need=-math.inf, cost=tokens)
            )
            self._charges.add(charge)
            charge.add_done_callback(self._charges.discard)

    async def close(self) -> None:
        await asyncio.gather(*self._charges)
        await self._redis.aclose()

    async def _need(self, key: Key, kind: str, size: int, *, cost: int) -> None:
        wait = await self._take(key, kind, size, need=1, cost=cost)
        if wait > 0:
            seconds = math.ceil(wait)
            raise TooManyRequests(
                f"key {key.name!r} ({key.id}) has used up its {size} {kind} of a minute; try again"
                f" in {seconds} s",
                retry_after=seconds,
            )

    async def _take(self, key: Key, kind: str, size: int, *, need: float, cost: int) -> float:
        """Seconds until there is what is needed; 0 where there is, and then it is taken."""
        name = f"errata:limit:{key.id}:{kind}"
        try:
            return float(await self._bucket(keys=[name], args=[size, max(need, -1e18), cost]))
        except RedisError as error:
            logger.warning("limits are not kept while Redis does not answer: %s", error)
            return 0.0
