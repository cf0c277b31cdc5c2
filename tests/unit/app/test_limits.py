"""What is taken of a key's tokens, on a real Redis."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing

import pytest
from redis import Redis

from app.limits import Limiter
from registry.errors import DeadlineExceeded, ErrataError, InvalidRequest
from registry.keys import Key
from serving.protocol import GenerateRequest, Piece, Usage, VersionRef
from tests.servers import RedisServer

VERSION = VersionRef("ver_x", "atlas", (), "")
IDS = GenerateRequest(VERSION, prompt_tokens=(5,) * 40, samples=2)
TEXT = GenerateRequest(VERSION, prompt="x" * 81, samples=2)
CHAT = GenerateRequest(VERSION, messages=({"role": "user", "content": "x" * 80},))
FIRST = Piece("a", (1,), prompt_tokens=30)
LAST = Piece("b", (2,), finish_reason="length", usage=Usage(30, 2))
WHOLE = Piece("b", (2,), finish_reason="length", usage=Usage(30, 1), prompt_tokens=30)

Pieces = Sequence[tuple[int, Piece] | ErrataError]


@pytest.fixture(scope="module")
def redis() -> Iterator[str]:
    with RedisServer() as server:
        yield server.url()


@pytest.fixture
def charged(
    redis: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Sequence[GenerateRequest], Pieces, int], int]:
    """What requests cost of which so many pieces are read."""
    monkeypatch.setattr(
        "app.limits.PATIENCE", 30.0
    )  # a machine may be busy: nothing goes uncharged
    key = Key(1, "key_1", "default", "ada", frozenset(), None, 1, 0.0, None, None)

    async def engine(pieces: Pieces) -> AsyncGenerator[tuple[int, Piece], None]:
        for piece in pieces:
            if isinstance(piece, ErrataError):
                raise piece
            yield piece
        await asyncio.Event().wait()

    async def read(requests: Sequence[GenerateRequest], pieces: Pieces, count: int) -> None:
        limiter = Limiter(redis)
        metered = limiter.metered(key, requests, engine(pieces))
        try:
            async with asyncio.timeout(0.2), aclosing(metered):
                for _ in range(count):
                    await anext(metered)
        except (TimeoutError, ErrataError):
            pass
        await limiter.close()

    def cost(requests: Sequence[GenerateRequest], pieces: Pieces, count: int) -> int:
        with Redis.from_url(redis) as client:
            client.flushall()
            asyncio.run(read(requests, pieces, count))
            level = client.hget("errata:limit:key_1:tokens", "level")
        return round(1 - float(level))  # type: ignore[arg-type]

    return cost


@pytest.mark.parametrize(
    ("requests", "pieces", "count", "cost"),
    [
        pytest.param([TEXT], [(0, FIRST)], 1, 31, id="hung up after the first piece"),
        pytest.param([TEXT], [(0, FIRST), (1, WHOLE), (0, LAST)], 3, 33, id="two samples"),
        pytest.param([TEXT, CHAT], [(2, FIRST), (0, FIRST)], 2, 62, id="two prompts"),
        pytest.param([TEXT], [], 1, 21, id="a text of which nothing came"),
        pytest.param([CHAT], [], 1, 20, id="messages of which nothing came"),
        pytest.param([IDS, TEXT], [(2, FIRST)], 1, 71, id="ids of which nothing came"),
        pytest.param([TEXT], [InvalidRequest("too long")], 1, 0, id="refused"),
        pytest.param([TEXT], [DeadlineExceeded("late")], 1, 21, id="too late"),
    ],
)
def test_a_prompt_is_charged_once_however_its_answer_ends(
    charged: Callable[[Sequence[GenerateRequest], Pieces, int], int],
    requests: Sequence[GenerateRequest],
    pieces: Pieces,
    count: int,
    cost: int,
) -> None:
    assert charged(requests, pieces, count) == cost
