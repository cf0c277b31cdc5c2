"""Which sequences a step computes. Plain Python: no torch, no clock, no thread.

First come, first served. A step takes the next token of every running sequence and as much of the
prompts, oldest first, as the token budget leaves. Blocks of the pool are taken as tokens come; when
none is left, the youngest sequence gives up its own and is computed again later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from math import lcm

from registry.errors import InvalidRequest
from serving.blocks import BLOCK, BlockManager, Table, blocks_for
from serving.plan import Segment, StepPlan

#: Tokens at whose multiples prompts are cut where bits must not depend on the load.
CHUNK = 256
#: Most rows of one segment whose logits are all wanted: they are as wide as the vocabulary.
MOST_OUTPUTS = 256
#: Most versions that compute one sequence.
MOST_VOICES = 3


@dataclass(frozen=True)
class Limits:
    """What a scheduler may plan.

    Attributes:
        grid: cut prompts at multiples of this many tokens only, whatever else runs, so that a
            sequence's bits do not depend on the load; 1: anywhere.
    """

    max_running: int
    max_waiting: int
    step_tokens: int
    kv_blocks: int
    context_length: int
    grid: int = 1

    @property
    def kv_tokens(self) -> int:
        return self.kv_blocks * BLOCK

    @property
    def running(self) -> int:
        """Most running voices, so that every step has room for a chunk of a prompt beside them."""
        return max(1, min(self.max_running, self.step_tokens - MOST_VOICES * self.chunk))

    @property
    def chunk(self) -> int:
        """Tokens of a prompt that every step has room for, in all of its voices; whole blocks if
        it can, for prefixes are shared where both end."""
        room = min(max(self.grid, BLOCK), max(1, self.step_tokens // (2 * MOST_VOICES)))
        return room - room % BLOCK or room


@dataclass(eq=False)
class Sequence:
    """A prompt and what was chosen after it. The scheduler owns it from ``add`` to ``remove``.

    Attributes:
        versions: stack digest of each version that computes it, in lock-step; mostly one.
        wants_prompt_logits: the logits of every prompt token are wanted.
        tenant: whose prefix it may share.
    """

    key: Hashable
    versions: tuple[str, ...]
    prompt: tuple[int, ...]
    max_tokens: int
    wants_prompt_logits: bool = False
    tenant: str = ""
    completion: list[int] = field(default_factory=list)
    computed: int = 0  # tokens whose keys and values are in the pool
    cached: int = 0  # tokens of the prompt that the prefix cache had
    was_admitted: bool = False
    tables: tuple[Table, ...] = ()

    def __post_init__(self) -> None:
        self.tables = tuple(Table((self.tenant, version)) for version in self.versions)

    @property
    def known(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt) + len(self.completion)

    @property
    def is_decoding(self) -> bool:
        """Only its newest token is still to compute."""
        return bool(self.completion) and self.computed == self.known - 1

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        size = len(self.prompt)
        if end <= size:
            return self.prompt[start:end]
        chosen = tuple(self.completion[max(0, start - size) : end - size])
        return self.prompt[start:] + chosen


class Scheduler:
    """Waiting and running sequences, and the blocks of the pool they hold."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.blocks = BlockManager(limits.kv_blocks)
        self.preempted = 0
        self._waiting: deque[Sequence] = deque()
        self._running: dict[Hashable, Sequence] = {}  # in order of admission
        self._beginning: dict[Hashable, Sequence] = {}  # by what a prompt that is computed begins

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
        """
        voices = len(sequence.versions)
        completion_limit(self.limits, len(sequence.prompt), sequence.max_tokens, voices)
        self._waiting.append(sequence)

    def remove(self, key: Hashable) -> Sequence | None:
        """Forget a sequence, finished or not, and free its blocks at once."""
        sequence = self._running.pop(key, None)
        if sequence is not None:
            self._release(sequence)
            return sequence
        for waiting in self._waiting:
            if waiting.key == key:
                self._waiting.remove(waiting)
                return waiting
        return None

    def plan(self) -> StepPlan | None:
        """The next step; None when there is nothing to do."""
        self._admit()
        running = list(self._running.values())
        budget = self.limits.step_tokens - sum(
            len(sequence.versions) for sequence in running if sequence.is_decoding
        )
        segments: list[Segment] = []
        for sequence in running:
            voices = len(sequence.versions)
            ends = [sequence.known] if sequence.is_decoding else self._cuts(sequence, budget)
            if sequence.key not in self._running or not ends or not self._hold(sequence, ends[-1]):
                continue
            if not sequence.is_decoding:
                budget -= voices * (ends[-1] - sequence.computed)
            segments += _segments(sequence, ends)
        if not segments:
            return None
        segments.sort(key=lambda segment: segment.version)  # stable: oldest first in a version
        return StepPlan(tuple(segments))

    def append(self, key: Hashable, token: int) -> None:
        """``token`` was chosen as a sequence's next."""
        self._running[key].completion.append(token)

    def advance(self, segment: Segment) -> None:
        """A segment was computed, as were its sequence's other voices'."""
        sequence = self._running.get(segment.key)
        if sequence is None:
            return
        sequence.computed = max(sequence.computed, segment.end)
        full = min(sequence.computed, self._shared_end(sequence)) // BLOCK
        if full > sequence.tables[0].published:
            tokens = sequence.tokens(0, full * BLOCK)
            for table in sequence.tables:
                self.blocks.publish(table, tokens)

    # -- blocks -----------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Let waiting sequences run, in order, while there is room for their tokens.

        A prompt that begins as one whose beginning is being computed waits for that: it can then
        take over its blocks.
        """
        self._beginning = {
            beginning: sequence
            for sequence in self._running.values()
            if sequence.computed < BLOCK and (beginning := _beginning(sequence)) is not None
        }
        voices = sum(len(sequence.versions) for sequence in self._running.values())
        passed: list[Sequence] = []
        while self._waiting:
            sequence = self._waiting[0]
            voices += len(sequence.versions)
            if self._running and voices > self.limits.running:
                break
            hits = self._hits(sequence)
            beginning = _beginning(sequence)
            if not hits and beginning in self._beginning:
                passed.append(self._waiting.popleft())
                voices -= len(sequence.versions)
                continue
            blocks = blocks_for(sequence.known + 1) * len(sequence.versions)
            spare = len(self._running)  # each will need a block before long
            if self._running and blocks + spare > self.blocks.available:
                break
            for table in sequence.tables:
                self.blocks.take_over(table, sequence.tokens(0, hits * BLOCK), hits)
            sequence.computed = hits * BLOCK
            if not sequence.was_admitted:  # later it takes over what it computed itself
                sequence.cached = sequence.computed
                sequence.was_admitted = True
            self._running[sequence.key] = self._waiting.popleft()
            if beginning is not None and not hits:
                self._beginning[beginning] = sequence
        self._waiting.extendleft(reversed(passed))

    def _hits(self, sequence: Sequence) -> int:
        """Blocks of the prefix cache that every voice can begin with; at least one token is left
        to compute, and all of them where their logits are wanted."""
        if sequence.wants_prompt_logits:
            return 0
        most = (min(sequence.known, self._shared_end(sequence)) - 1) // BLOCK
        tokens = sequence.tokens(0, most * BLOCK)
        found = min(self.blocks.match(table, tokens, most) for table in sequence.tables)
        if self.limits.grid > 1:
            found -= found % (lcm(self.limits.chunk, BLOCK) // BLOCK)
        return found

    def _shared_end(self, sequence: Sequence) -> int:
        """Tokens that may be shared: on a grid only what was computed on it."""
        return len(sequence.prompt) if self.limits.grid > 1 else sequence.known

    def _hold(self, sequence: Sequence, tokens: int) -> bool:
        """Give a running sequence blocks for its first ``tokens``; False where it lost its own."""
        for table in sequence.tables:
            while len(table.blocks) < blocks_for(tokens):
                if self.blocks.grow(table):
                    continue
                youngest = next(reversed(self._running.values()))
                self._preempt(youngest)
                if youngest is sequence:
                    return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        del self._running[sequence.key]
        self._release(sequence)
        sequence.computed = 0
        self.preempted += 1
        self._waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        for table in sequence.tables:
            self.blocks.release(table)

    # -- tokens -----------------------------------------------------------------------------------

    def _cuts(self, sequence: Sequence, budget: int) -> list[int]:
        """Where the segments that compute a sequence's known tokens end, within the budget.

        On a grid, what was chosen before a preemption is computed again token by token, as it was
        the first time.
        """
        grid, start, prompt = self.limits.grid, sequence.computed, len(sequence.prompt)
        most = start + max(0, budget) // len(sequence.versions)
        if sequence.wants_prompt_logits:
            most = min(most, start + MOST_OUTPUTS)
        if grid == 1:
            end = min(sequence.known, most)
            return [end] if end > start else []
        if start >= prompt:
            return [start + 1] if start < most else []
        step = self.limits.chunk
        cuts = [*range(start - start % step + step, prompt, step), prompt]
        return [end for end in cuts if end <= most]


def completion_limit(
    limits: Limits, prompt_tokens: int, max_tokens: int | None, voices: int = 1
) -> int:
    """How many tokens a completion may have; without ``max_tokens`` as many as fit.

    Raises:
        InvalidRequest: prompt and completion pass the context length or the cache.
    """
    most, name = limits.context_length, "the model's context length"
    capacity = limits.kv_blocks // voices * BLOCK  # no voices share a block
    if capacity < most:
        most, name = capacity, "the engine's key-value capacity (ERRATA_KV_BYTES)"
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


def _beginning(sequence: Sequence) -> Hashable | None:
    """What the first block of a sequence holds, where it is full."""
    if len(sequence.prompt) <= BLOCK or sequence.wants_prompt_logits:
        return None
    return (sequence.tenant, sequence.versions, sequence.prompt[:BLOCK])


def _segments(sequence: Sequence, ends: list[int]) -> list[Segment]:
    """Segments up to each end, for every voice; the last known token's logits are wanted."""
    segments = []
    start = sequence.computed
    for end in ends:
        outputs = int(end == sequence.known)
        if sequence.wants_prompt_logits and end <= len(sequence.prompt):
            outputs = end - start
        tokens = sequence.tokens(start, end)
        for voice, (version, table) in enumerate(
            zip(sequence.versions, sequence.tables, strict=True)
        ):
            blocks = tuple(table.blocks[: blocks_for(end)])
            segments.append(Segment(sequence.key, voice, version, tokens, start, blocks, outputs))
        start = end
    return segments
