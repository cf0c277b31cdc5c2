"""Run one HTTP request's completions on the engine, whole or streamed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from serving.client import EngineClient
from serving.protocol import GenerateRequest, Piece, TokenLogprob, Usage


@dataclass
class Completion:
    """One choice, put together from its pieces."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = "length"
    usage: Usage = field(default_factory=lambda: Usage(0, 0))

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.logprobs.extend(piece.logprobs or ())
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.usage = piece.usage or self.usage


async def merged(
    engine: EngineClient, requests: Sequence[GenerateRequest]
) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of all requests as they come, each with its request's index.

    Leaving early cancels what still runs; one request's error ends them all.
    """
    pieces: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue()

    async def run(index: int, request: GenerateRequest) -> None:
        try:
            async with aclosing(engine.generate(request)) as stream:
                async for piece in stream:
                    pieces.put_nowait((index, piece))
            pieces.put_nowait((index, None))
        except Exception as error:  # whatever it is, the reader raises it: it must not wait on
            pieces.put_nowait((index, error))

    tasks = [asyncio.create_task(run(i, request)) for i, request in enumerate(requests)]
    try:
        running = len(tasks)
        while running:
            index, item = await pieces.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def total_usage(completions: Sequence[Completion], choices: int) -> dict[str, int]:
    """OpenAI's usage object: a prompt counts once, however many choices it has."""
    prompt = sum(c.usage.prompt_tokens for c in completions[::choices])
    completion = sum(c.usage.completion_tokens for c in completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
