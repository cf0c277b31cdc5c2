"""A lane: one base's scheduler, runner and streams, and what a step makes of them."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from registry.bases import Base
from registry.errors import ErrataError
from serving.plan import Segment, StepPlan
from serving.prompts import PromptReader
from serving.protocol import BaseStatus, Piece
from serving.runner import Runner
from serving.sampling import choose
from serving.scheduler import Scheduler
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
        *,
        batch_invariant: bool,
    ) -> None:
        self.base = base
        self.runner = runner
        self.scheduler = scheduler
        self.prompts = prompts
        self.decoder = decoder
        self.eos = eos
        self.batch_invariant = batch_invariant
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._streams: dict[Hashable, Stream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def add(self, stream: Stream) -> list[Output]:
        try:
            self.scheduler.add(stream.sequence)
        except ErrataError as error:
            return [Output(stream.key, error=error)]
        self._streams[stream.key] = stream
        return []

    def cancel(self, key: Hashable) -> list[Output]:
        """End a stream and free what it holds; nothing where it ended already."""
        return [self._end(key)] if key in self._streams else []

    def step(self) -> list[Output]:
        """Compute one step. A failure ends the streams of the version that failed, no others."""
        plan = self.scheduler.plan()
        return [] if plan is None else self._run(plan)

    def fail(self, error: Exception) -> list[Output]:
        """End every stream: something is wrong that no single version explains."""
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
            kv_used=self.scheduler.spans.used,
        )

    def _run(self, plan: StepPlan) -> list[Output]:
        """The outputs of a plan; when it fails, of each version's part of it."""
        try:
            logits, tokens = self._compute(plan)
        except Exception as error:
            parts = plan.by_version()
            if len(parts) > 1:
                return [output for part in parts for output in self._run(part)]
            logger.exception("base %s: a step failed", self.base.name)
            return self._failed([segment.key for segment in plan.segments], error)
        for segment in plan.segments:
            if not segment.samples:
                self.scheduler.advance(segment)
        return [
            self._advance(segment, token, row)
            for segment, token, row in zip(plan.sampling, tokens, logits, strict=True)
        ]

    def _compute(self, plan: StepPlan) -> tuple[Tensor, list[int | None]]:
        """The logits [n, vocabulary] after each sampling segment, and the tokens chosen there."""
        streams = self._streams
        effects = {segment.version: streams[segment.key].effects for segment in plan.segments}
        logits = self.runner.logits(plan, effects)
        return logits, choose(logits, [streams[segment.key].sampler for segment in plan.sampling])

    def _advance(self, segment: Segment, token: int | None, logits: Tensor) -> Output:
        if token is None:
            return self._end(
                segment.key,
                ErrataError(
                    "the version's logits are not finite for this prompt; a delta of its stack is"
                    " too large",
                    code="not_finite",
                ),
            )
        stream = self._streams[segment.key]
        if not stream.sequence.is_decoding:
            self.prompt_tokens += len(stream.sequence.prompt)
        self.scheduler.advance(segment, token)
        piece = stream.take(token, logits)
        self.completion_tokens += len(piece.tokens)
        if piece.finish_reason is not None:
            self._end(segment.key)
        return Output(segment.key, piece)

    def _failed(self, keys: list[Hashable], error: Exception) -> list[Output]:
        failure = ErrataError(
            f"the engine failed while it computed this request ({type(error).__name__}); others"
            " are not affected"
        )
        return [self._end(key, failure) for key in dict.fromkeys(keys) if key in self._streams]

    def _end(self, key: Hashable, error: ErrataError | None = None) -> Output:
        self.scheduler.remove(key)
        del self._streams[key]
        return Output(key, error=error)
