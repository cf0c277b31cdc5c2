"""What one step computes: segments of sequences in one flat row, ordered by version."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens of one sequence that are computed together.

    Attributes:
        key: the sequence's.
        version: stack digest of the sequence's version.
        tokens: [n] token ids.
        position: of the first token in the sequence; the keys before it are in the pool.
        slot: pool slot of the sequence's first token.
        samples: whether a next token is chosen after the last one.
    """

    key: Hashable
    version: str
    tokens: tuple[int, ...]
    position: int
    slot: int
    samples: bool


@dataclass(frozen=True)
class StepPlan:
    """Segments of one flat row; those of a version stand together."""

    segments: tuple[Segment, ...]

    @cached_property
    def rows(self) -> int:
        return sum(len(segment.tokens) for segment in self.segments)

    @cached_property
    def sampling(self) -> tuple[Segment, ...]:
        """The segments that ask for logits, in the order of the logits' rows."""
        return tuple(segment for segment in self.segments if segment.samples)

    def by_version(self) -> list[StepPlan]:
        """The same work as one plan a version."""
        groups = groupby(self.segments, key=lambda segment: segment.version)
        return [StepPlan(tuple(group)) for _, group in groups]
