"""A lane: one base's scheduler, runner and streams, and what a step makes of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from registry.bases import Base
from registry.errors import ErrataError, TooManyRequests
from serving.blocks import BLOCK
from serving.counters import STEP_SECONDS, STEP_TOKENS, Histogram
from serving.guides import Guides
from serving.plan import Segment, StepPlan
from serving.prompts import PromptReader
from serving.protocol import Piece
from serving.runner import Runner
from serving.sampling import Choice, choose
from serving.scheduler import Scheduler
from serving.status import BaseStatus
from serving.stream import Stream
from serving.text import Decoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Output:
    """What a step has for one request. Every stream gets exactly one output that ends it."""

    key: Hashable
    piece: Piece | None = None
    error: ErrataError | None = None

    @property
    def ends(self) -> bool:
        return self.piece is None or self.piece.finish_reason is not None


class Lane:
    """One base at work. ``add``, ``cancel`` and ``step`` are called by the step thread only."""

    def __init__(
        self,
        base: Base,
        runner: Runner,
        scheduler: Scheduler,
        prompts: PromptReader,
        decoder: Decoder,
        eos: frozenset[int],
        guides: Guides,
        *,
        batch_invariant: bool,
    ) -> None:
        self.base = base
        self.runner = runner
        self.scheduler = scheduler
        self.prompts = prompts
        self.decoder = decoder
        self.eos = eos
        self.guides = guides
        self.batch_invariant = batch_invariant
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cached_tokens = 0  # of the prompts', those that the prefix cache had
        self.step_tokens = Histogram(STEP_TOKENS)
        self.step_seconds = Histogram(STEP_SECONDS)
        self._streams: dict[Hashable, Stream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def full(self, retry_after: int = 1) -> TooManyRequests:
        """What a request is told for which the queue has no place; ``retry_after`` in seconds."""
        return TooManyRequests(
            f"{self.scheduler.limits.max_waiting} requests wait for base {self.base.name!r}"
            " already, the most allowed (ERRATA_MAX_WAITING); try again later",
            code="engine_full",
            retry_after=retry_after,
        )

    def add(self, stream: Stream) -> list[Output]:
        """Queue a stream, or end it with an error: it can never fit, or the queue is full."""
        try:
            if self.scheduler.waiting >= self.scheduler.limits.max_waiting:
                raise self.full()
            self.scheduler.add(stream.sequence)
        except ErrataError as error:
            return [Output(stream.key, error=error)]
        self._streams[stream.key] = stream
        return []

    def cancel(self, key: Hashable) -> list[Output]:
        """End a stream and free what it holds; nothing where it ended already."""
        return [self._end(key)] if key in self._streams else []

    def step(self) -> list[Output]:
        """Compute one step. What cannot be computed ends, alone.

        Raises:
            AcceleratorError: the device is lost to this process, and with it every stream.
        """
        plan = self.scheduler.plan()
        if plan is None:
            return []
        begun = time.monotonic()
        for segment in plan.segments:
            self._streams[segment.key].begin(begun)
        outputs = self._run(plan)
        self.step_tokens.observe(sum(len(segment.tokens) for segment in plan.segments))
        self.step_seconds.observe(time.monotonic() - begun)
        return outputs

    def fail(self, error: Exception) -> list[Output]:
        """End every stream: something is wrong that no single version explains.

        Raises:
            AcceleratorError: the error is one.
        """
        return self._failed(list(self._streams), error)

    def status(self) -> BaseStatus:
        return BaseStatus(
            name=self.base.name,
            digest=self.base.digest,
            family=self.base.family,
            dtype=str(self.runner.model.dtype).removeprefix("torch."),
            context_length=self.base.context_length,
            vocab_size=self.runner.model.config.vocab_size,
            has_chat_template=self.base.has_chat_template,
            batch_invariant=self.batch_invariant,
            min_rows=self.runner.min_rows,
            running=self.scheduler.running,
            waiting=self.scheduler.waiting,
            kv_tokens=self.scheduler.limits.kv_tokens,
            kv_used=self.scheduler.blocks.held * BLOCK,
            kv_cached=self.scheduler.blocks.cached * BLOCK,
            kv_block=BLOCK,
            preempted=self.scheduler.preempted,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            cached_tokens=self.cached_tokens,
            step_tokens=self.step_tokens,
            step_seconds=self.step_seconds,
        )

    def _run(self, plan: StepPlan) -> list[Output]:
        """The outputs of a plan; when it fails, of each of its parts, down to single streams."""
        try:
            choices = self._compute(plan)
        except Exception as error:
            parts = self._parts(plan)
            if len(parts) == 1:
                logger.exception("base %s: a step failed", self.base.name)
                return self._failed([segment.key for segment in plan.segments], error)
        else:
            for segment in plan.segments:
                self.scheduler.advance(segment)
            return [self._advance(stream, choice) for stream, choice in choices]
        # only here, where the error holds the failed step's memory no more
        return [output for part in parts for output in self._run(part)]

    def _compute(self, plan: StepPlan) -> list[tuple[Stream, Choice | None]]:
        """The streams whose next token the plan leads to, and what is chosen there."""
        streams = [self._streams[segment.key] for segment in plan.segments]
        effects = {
            segment.version: stream.effects[segment.voice]
            for segment, stream in zip(plan.segments, streams, strict=True)
        }
        logits = self.runner.logits(plan, effects)
        rows: dict[Stream, dict[int, int]] = {}  # by stream and voice, the row of logits
        row = 0
        for segment, stream in zip(plan.segments, streams, strict=True):
            if stream.sequence.wants_prompt_logits and segment.voice == 0 and segment.outputs:
                stream.prompt_logits(segment.position, logits[row : row + segment.outputs])
            row += segment.outputs
            if segment.end == stream.sequence.known:
                rows.setdefault(stream, {})[segment.voice] = row - 1
        if not rows:
            return []
        if len(rows) < len(logits):
            logits = self._combined(logits, rows)
        samplers = [stream.sampler for stream in rows]
        return list(zip(rows, choose(logits, samplers), strict=True))

    @torch.inference_mode()
    def _combined(self, logits: Tensor, rows: Mapping[Stream, Mapping[int, int]]) -> Tensor:
        """One row of logits a stream, of all its voices' rows."""
        combined = logits[[voices[0] for voices in rows.values()]]
        for place, (stream, voices) in enumerate(rows.items()):
            if len(voices) > 1:
                combined[place] = stream.combine(logits[[voices[v] for v in sorted(voices)]])
        return combined

    def _parts(self, plan: StepPlan) -> list[StepPlan]:
        """The same work as one plan for each set of versions that stand or fall together; of one
        set's, as one for each half of its streams."""
        part_of: dict[Hashable, Hashable] = {
            segment.key: self._streams[segment.key].sequence.versions for segment in plan.segments
        }
        if len(set(part_of.values())) == 1:
            part_of = {key: place < len(part_of) // 2 for place, key in enumerate(part_of)}
        parts: dict[Hashable, list[Segment]] = {}
        for segment in plan.segments:
            parts.setdefault(part_of[segment.key], []).append(segment)
        return [StepPlan(tuple(segments)) for segments in parts.values()]

    def _advance(self, stream: Stream, choice: Choice | None) -> Output:
        if choice is None:
            return self._end(stream.key, stream.failure())
        if not stream.sequence.completion:
            self.prompt_tokens += len(stream.sequence.prompt)
            self.cached_tokens += stream.sequence.cached
        self.scheduler.append(stream.key, choice.token)
        try:
            piece = stream.take(choice)
        except ErrataError as error:
            return self._end(stream.key, error)
        except Exception as error:  # a tokenizer: this stream's own
            logger.exception("base %s: a token could not be taken", self.base.name)
            return self._end(stream.key, _failure(error))
        self.completion_tokens += len(piece.tokens)
        if piece.finish_reason is not None:
            self._end(stream.key)
        return Output(stream.key, piece)

    def _failed(self, keys: list[Hashable], error: Exception) -> list[Output]:
        failure = _failure(error)
        return [self._end(key, failure) for key in dict.fromkeys(keys) if key in self._streams]

    def _end(self, key: Hashable, error: ErrataError | None = None) -> Output:
        self.scheduler.remove(key)
        del self._streams[key]
        return Output(key, error=error)


def _failure(error: Exception) -> ErrataError:
    """What requests are told that an error ends.

    Raises:
        AcceleratorError: it is one: the device does no more work for this process.
    """
    if isinstance(error, torch.AcceleratorError):
        raise error
    return ErrataError(
        f"the engine failed while it computed this request ({type(error).__name__}); others are"
        " not affected"
    )
