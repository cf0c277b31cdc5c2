"""Which sequences a step computes. Plain Python: no torch, no clock, no thread.

First come, first served. A step takes the next token of every running sequence, then chunks of
prompts, oldest first, while the token budget lasts. Prompts are cut at multiples of the chunk
whatever else runs, so that a sequence's bits do not depend on the load.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

from registry.errors import InvalidRequest, TooManyRequests
from serving.plan import Segment, StepPlan
from serving.spans import Span, SpanAllocator

#: Tokens after which a prompt is cut.
CHUNK = 256


@dataclass(frozen=True)
class Limits:
    """What a scheduler may plan.

    ``running`` and ``chunk`` are at most what leaves room, in every step, for one chunk beside all
    running sequences.
    """

    max_running: int
    max_waiting: int
    step_tokens: int
    kv_tokens: int
    context_length: int

    @property
    def chunk(self) -> int:
        return min(CHUNK, max(1, self.step_tokens // 2))

    @property
    def running(self) -> int:
        return max(1, min(self.max_running, self.step_tokens - self.chunk))


@dataclass(eq=False)
class Sequence:
    """A prompt and what was chosen after it. The scheduler owns it from ``add`` to ``remove``."""

    key: Hashable
    version: str
    prompt: tuple[int, ...]
    max_tokens: int
    completion: list[int] = field(default_factory=list)
    computed: int = 0  # tokens whose keys and values are in the pool
    span: Span | None = None

    @property
    def is_decoding(self) -> bool:
        return self.computed >= len(self.prompt)


class Scheduler:
    """Waiting and running sequences, and the slots of the pool they hold."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.spans = SpanAllocator(limits.kv_tokens)
        self._waiting: deque[Sequence] = deque()
        self._running: dict[Hashable, Sequence] = {}  # in order of admission

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def __len__(self) -> int:
        return self.running + self.waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            InvalidRequest: it can never fit.
            TooManyRequests: the queue is full.
        """
        completion_limit(self.limits, len(sequence.prompt), sequence.max_tokens)
        if self.waiting >= self.limits.max_waiting:
            raise TooManyRequests(
                f"{self.waiting} requests wait already, the most allowed; try again later",
                retry_after=1,
            )
        self._waiting.append(sequence)

    def remove(self, key: Hashable) -> Sequence | None:
        """Forget a sequence, finished or not, and free its slots at once."""
        sequence = self._running.pop(key, None)
        if sequence is not None:
            if sequence.span is not None:
                self.spans.free(sequence.span)
            return sequence
        for waiting in self._waiting:
            if waiting.key == key:
                self._waiting.remove(waiting)
                return waiting
        return None

    def plan(self) -> StepPlan | None:
        """The next step; None when there is nothing to do."""
        self._admit()
        if not self._running:
            return None
        budget = self.limits.step_tokens
        segments: list[Segment] = []
        prefilling: list[Sequence] = []
        for sequence in self._running.values():
            if sequence.is_decoding:
                segments.append(_decode(sequence))
                budget -= 1
            else:
                prefilling.append(sequence)
        for sequence in prefilling:
            chunks = self._chunks(sequence, budget)
            segments += chunks
            budget -= sum(len(chunk.tokens) for chunk in chunks)
        segments.sort(key=lambda segment: segment.version)  # stable: oldest first in a version
        return StepPlan(tuple(segments))

    def advance(self, segment: Segment, token: int | None = None) -> None:
        """A segment was computed: its keys and values are in the pool, ``token`` comes next."""
        if (sequence := self._running.get(segment.key)) is not None:
            sequence.computed = segment.position + len(segment.tokens)
            if token is not None:
                sequence.completion.append(token)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.limits.running:
            sequence = self._waiting[0]
            span = self.spans.allocate(len(sequence.prompt) + sequence.max_tokens)
            if span is None:
                return
            sequence.span = span
            self._running[sequence.key] = self._waiting.popleft()

    def _chunks(self, sequence: Sequence, budget: int) -> list[Segment]:
        """As many whole chunks of the prompt as the budget holds."""
        chunks: list[Segment] = []
        start, end = sequence.computed, len(sequence.prompt)
        while start < end:
            stop = min(start - start % self.limits.chunk + self.limits.chunk, end)
            budget -= stop - start
            if budget < 0:
                break
            tokens = sequence.prompt[start:stop]
            chunks.append(_segment(sequence, tokens, start, samples=stop == end))
            start = stop
        return chunks


def completion_limit(limits: Limits, prompt_tokens: int, max_tokens: int | None) -> int:
    """How many tokens a completion may have; without ``max_tokens`` as many as fit.

    Raises:
        InvalidRequest: prompt and completion pass the context length or the cache.
    """
    most, name = limits.context_length, "the model's context length"
    if limits.kv_tokens < most:
        most, name = limits.kv_tokens, "the engine's key-value capacity (ERRATA_KV_TOKENS)"
    wanted = 1 if max_tokens is None else max_tokens
    if prompt_tokens + wanted > most:
        raise InvalidRequest(
            f"the prompt has {prompt_tokens} tokens and max_tokens is {wanted}: together"
            f" {prompt_tokens + wanted}, more than {most}, {name}; shorten the prompt or lower"
            " max_tokens",
            param="prompt" if prompt_tokens >= most else "max_tokens",
            code="context_length_exceeded",
        )
    return most - prompt_tokens if max_tokens is None else max_tokens


def _decode(sequence: Sequence) -> Segment:
    position = sequence.computed
    token = sequence.completion[position - len(sequence.prompt)]
    return _segment(sequence, (token,), position, samples=True)


def _segment(
    sequence: Sequence, tokens: tuple[int, ...], position: int, *, samples: bool
) -> Segment:
    slot = 0 if sequence.span is None else sequence.span.start
    return Segment(sequence.key, sequence.version, tokens, position, slot, samples)
