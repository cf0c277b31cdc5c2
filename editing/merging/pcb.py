"""PCB-Merging: parameters compete within a task and between tasks (Du et al. 2024,
arXiv:2410.02396)."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator as Draws
from torch import Tensor

from editing.merging.hyperparameters import PcbHyperparameters
from editing.merging.interface import Merge, Pass, beside, weighted_sum
from editing.merging.order import order_statistics
from registry.manifests import Progress

#: Of |τ|, the share beyond which outliers are clamped, at either end.
CLAMPED = 1e-4


def pcb(tensors: Pass, hyperparameters: PcbHyperparameters) -> Generator[Progress, None, Merge]:
    """With n tasks, a = |τ| clamped to its quantiles of 0.01 % and 99.99 %:

        intra = exp(n · minmax(a)²)      inter = tanh(τ ⊙ Σ τ)
        s = minmax(clamp(intra ⊙ inter, from the quantile 1 − r))
        merged = Σ λ sgn(τ) ⊙ a ⊙ s / Σ s

    Quantiles, least and greatest are those of a task's whole change: of all tensors that any of
    the versions changes, together. They are found exactly, by passes over the tensors. The
    published code has one λ for all tasks. A task that changes nothing has no part in the merge
    (there: NaN).
    """

    def ends(count: int) -> Sequence[int]:
        return int(count * CLAMPED), int(count * (1 - CLAMPED) - 1)

    def sizes() -> Iterator[Tensor]:
        return (taus.abs() for taus in tensors())

    first = Progress(0, 0, "ranking the changes of the whole model")
    found = yield from order_statistics(sizes, ends, first)
    span = _Span(*found.T)

    def scores() -> Iterator[Tensor]:
        return (_score(taus, span) for taus in tensors())

    def top(count: int) -> Sequence[int]:
        return min(count - 1, int(count * (1 - hyperparameters.ratio))), count - 1

    second = Progress(0, 0, "ranking the scores of the whole model")
    found = yield from order_statistics(scores, top, second)
    kept = _Span(*found.T)

    def merge(
        taus: Tensor, weights: Tensor, own: PcbHyperparameters, draws: Sequence[Draws]
    ) -> Tensor:
        scale = kept.minmax(_score(taus, span))
        clamped = span.clamp(taus.abs()).mul_(taus.sign_()).mul_(scale)
        return weighted_sum(clamped, weights) / scale.sum(0).clamp_(min=1e-12)

    return merge


@dataclass(frozen=True)
class _Span:
    """From where to where the numbers of each task go: [k]."""

    low: Tensor
    high: Tensor

    def clamp(self, x: Tensor) -> Tensor:
        """x [k, ...]"""
        return x.clamp(beside(self.low, x), beside(self.high, x))

    def minmax(self, x: Tensor) -> Tensor:
        """x [k, ...] clamped -> 0 to 1; zero where all numbers of a task are one."""
        length = self.high - self.low
        length = torch.where(length > 0, length, torch.inf)
        return (self.clamp(x) - beside(self.low, x)) / beside(length, x)


def _score(taus: Tensor, span: _Span) -> Tensor:
    intra = span.minmax(taus.abs()).square_().mul_(len(taus)).exp_()
    return intra.mul_((taus * taus.sum(0)).tanh_())
