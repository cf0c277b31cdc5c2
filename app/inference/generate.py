"""One HTTP request's completions, put together from their pieces."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request

from serving.protocol import Piece, TokenLogprob, Usage

T = TypeVar("T")


@dataclass
class Completion:
    """One choice."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = "length"
    usage: Usage = field(default_factory=lambda: Usage(0, 0))

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.logprobs.extend(piece.logprobs or ())
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.usage = piece.usage or self.usage

    @property
    def mean_logprob(self) -> float:
        """Of the completion's tokens, an echoed prompt left out; an empty one is the worst."""
        tokens = self.usage.completion_tokens
        lead = self.usage.prompt_tokens if len(self.logprobs) > tokens + 1 else 0
        values = [entry.logprob or 0.0 for entry in self.logprobs[lead : lead + tokens]]
        return sum(values) / len(values) if values else -float("inf")


def best(completions: Sequence[Completion], samples: int, choices: int) -> list[Completion]:
    """Of every ``samples`` completions of a prompt the ``choices`` likeliest, best first."""
    if samples == choices:
        return list(completions)
    return [
        completion
        for start in range(0, len(completions), samples)
        for completion in sorted(
            completions[start : start + samples], key=lambda c: c.mean_logprob, reverse=True
        )[:choices]
    ]


def total_usage(usages: Sequence[Usage], samples: int) -> dict[str, Any]:
    """OpenAI's usage object: a prompt counts once, however many samples it has."""
    cached = sum(usage.cached_tokens for usage in usages[::samples])
    prompt = sum(usage.prompt_tokens for usage in usages[::samples])
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


async def unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """What ``work`` returns; None where the client hung up first, which cancels the work."""
    working = asyncio.ensure_future(work)
    listening = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, listening):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
