"""Decode steps as CUDA graphs: one launch a step instead of one a kernel.

A step in which every sequence computes one token is a fixed list of kernels over tensors of a few
sizes. It is captured for a size with room (rows and blocks rounded up) once the same versions have
stood in the same rows for some steps, and then replayed with new numbers in the same memory. A
graph serves only if its first replay gives what the plain step gives. All but the capture itself
runs on any device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from serving.attention import PackedStep, SingleRows
from serving.blocks import BLOCK, blocks_for
from serving.effects import EffectHooks
from serving.kv import KVPool
from serving.plan import StepPlan

logger = logging.getLogger(__name__)

#: Steps of one layout after which a graph is worth its capture.
STEADY = 8
#: Graphs that are kept; the oldest goes first.
MOST_GRAPHS = 16
#: Largest difference of a replay's logits from the plain step's, as a part of the largest.
TOLERANCE = 1e-2

#: Token ids [1, rows], positions [1, rows], the rows that want logits, and the step -> logits.
Forward = Callable[[Tensor, Tensor, Tensor, PackedStep], Tensor]
#: From a function over fixed memory to one that does the same again.
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


def capture_for(device: torch.device) -> Capture | None:
    """How a step is captured on this device; None where there is no such thing."""
    return _captured if device.type == "cuda" else None


def _captured(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        compute()  # what is set up at first use must not be captured
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others load versions
        logits = compute()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


@dataclass(eq=False)
class _Graph:
    """A graph, and all memory that it reads: a replay looks where the capture looked."""

    step: StaticStep
    ids: Tensor
    positions: Tensor
    every: Tensor  # the rows that want logits: all of them
    replay: Callable[[], Tensor] | None = None


@dataclass
class DecodeGraphs:
    """The graphs of one runner.

    Attributes:
        pool: keys and values; no sequence has its last block.
        capture: how a step is captured.
        replays: steps that were replayed.
    """

    pool: KVPool
    capture: Capture
    replays: int = 0
    _graphs: dict[Hashable, _Graph] = field(default_factory=dict)
    _is_broken: bool = False

    def logits(self, plan: StepPlan, hooks: EffectHooks, forward: Forward) -> Tensor | None:
        """The logits [segments, vocabulary] of a plan; None where it is no case for a graph."""
        if self._is_broken or hooks.steps < STEADY or not plan.is_decode:
            return None
        rows = _rounded(plan.rows + 1)  # at least one row owns the blocks that only fill up
        blocks = _rounded(sum(blocks_for(segment.end) for segment in plan.segments))
        key = (rows, blocks, hooks.layout)
        if (graph := self._graphs.get(key)) is None:
            graph = self._new(rows, blocks)
            while len(self._graphs) >= MOST_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = graph
        graph.step.fill(plan)
        tokens = [segment.tokens[0] for segment in plan.segments]
        positions = [segment.position for segment in plan.segments]
        _refill(graph.ids[0], tokens, 0)
        _refill(graph.positions[0], positions, 0)
        if graph.replay is None:
            return self._first(graph, plan.rows, forward)
        self.replays += 1
        return graph.replay()[: plan.rows]

    def _new(self, rows: int, blocks: int) -> _Graph:
        ids = torch.zeros(1, rows, dtype=torch.long, device=self.pool.device)
        every = torch.arange(rows, device=self.pool.device)
        return _Graph(StaticStep(self.pool, rows, blocks), ids, torch.zeros_like(ids), every)

    def _first(self, graph: _Graph, rows: int, forward: Forward) -> Tensor:
        """The plain step over the graph's memory, and the capture of it."""

        def compute() -> Tensor:
            return forward(graph.ids, graph.positions, graph.every, graph.step)

        plain = compute()[:rows].clone()
        if not bool(plain.isfinite().all()):  # a replay that is wrong could not be told from it
            return plain
        try:
            graph.replay = self.capture(compute)
            graph.replay().fill_(torch.nan)  # one that does nothing must not find right numbers
            replayed = graph.replay()[:rows]
            scale = plain.abs().max().clamp(min=1)
            agrees = bool((replayed - plain).abs().max() <= TOLERANCE * scale)
        except RuntimeError as error:
            logger.warning("decode steps run without graphs: a capture failed: %s", error)
            agrees = False
        if not agrees:
            self._is_broken = True
            self._graphs.clear()
        return plain


class StaticStep(PackedStep):
    """A step of ``rows`` segments of one token whose tensors stay where they are.

    Rows and blocks that a plan does not use are computed for nothing, on a block of the pool that
    no sequence has.
    """

    def __init__(self, pool: KVPool, rows: int, blocks: int) -> None:
        self.pool = pool
        self.rows = rows
        self.stores_only = False
        self.varlen = None
        self.parts = []
        self._spare = pool.blocks - 1
        self._count = blocks
        self._blocks = torch.full((rows,), self._spare, dtype=torch.long, device=pool.device)
        self._offsets = torch.zeros_like(self._blocks)
        self._batches: dict[int, SingleRows] = {}
        self._plan = StepPlan(())

    def fill(self, plan: StepPlan) -> None:
        """Put a plan's numbers into the tensors."""
        self._plan = plan
        segments = plan.segments
        begun = [s.blocks[-1] for s in segments if s.position % BLOCK == 0]
        if begun:
            self.pool.clear(torch.tensor(begun, device=self.pool.device))
        _refill(self._blocks, [s.blocks[s.position // BLOCK] for s in segments], self._spare)
        _refill(self._offsets, [s.position % BLOCK for s in segments], 0)
        for window, batch in self._batches.items():
            batch.fill(list(enumerate(segments)), window, self._spare)

    def singles(self, window: int) -> SingleRows:
        if (batch := self._batches.get(window)) is None:
            batch = SingleRows.with_room(self.rows, self._count, self.pool)
            batch.fill(list(enumerate(self._plan.segments)), window, self._spare)
            self._batches[window] = batch
        return batch


def _rounded(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


def _refill(tensor: Tensor, values: list[int], rest: int) -> None:
    """Write values, and ``rest`` behind them, into a tensor [n] that stays where it is."""
    filled = values + [rest] * (len(tensor) - len(values))
    tensor.copy_(torch.tensor(filled, dtype=tensor.dtype))
