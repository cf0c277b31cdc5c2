"""What one step computes: segments of sequences in one flat row, ordered by version."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cached_property


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens of one sequence that are computed together.

    Attributes:
        key: the sequence's.
        voice: which of the sequence's versions this is.
        version: stack digest of that version.
        tokens: [n] token ids.
        position: of the first token in the sequence; the keys before it are in the pool.
        blocks: the pool's blocks that hold the sequence's keys and values, in order.
        outputs: how many of the last tokens' logits are wanted.
    """

    key: Hashable
    voice: int
    version: str
    tokens: tuple[int, ...]
    position: int
    blocks: tuple[int, ...]
    outputs: int

    @property
    def end(self) -> int:
        """Tokens of the sequence that are in the pool after the step."""
        return self.position + len(self.tokens)


@dataclass(frozen=True)
class StepPlan:
    """Segments of one flat row; those of a version stand together."""

    segments: tuple[Segment, ...]

    @cached_property
    def rows(self) -> int:
        return sum(len(segment.tokens) for segment in self.segments)

    @cached_property
    def outputs(self) -> int:
        return sum(segment.outputs for segment in self.segments)

    @cached_property
    def is_decode(self) -> bool:
        """Whether every segment is one token whose logits are wanted."""
        return all(len(s.tokens) == s.outputs == 1 for s in self.segments)

    def ends(self) -> StepPlan:
        """Only the rows whose logits are wanted."""
        return StepPlan(
            tuple(
                replace(
                    segment,
                    tokens=segment.tokens[-segment.outputs :],
                    position=segment.end - segment.outputs,
                )
                for segment in self.segments
                if segment.outputs
            )
        )
