"""What a way to merge is, and the parts that several of them share."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Protocol

from torch import Generator as Draws
from torch import Tensor

from registry.manifests import Progress


class Merge(Protocol):
    """The merged change of one tensor of the model."""

    def __call__(
        self, taus: Tensor, weights: Tensor, hyperparameters: Any, draws: Sequence[Draws], /
    ) -> Tensor:
        """taus τ [k, ...], each version's change of the tensor; weights λ [k]; one generator of
        random numbers a version -> [...]. What is random comes from ``draws`` alone. ``taus`` may
        be overwritten."""


#: A pass over the changes τ [k, ...] of every tensor of the model.
Pass = Callable[[], Iterator[Tensor]]


class Whole(Protocol):
    """A merge of one tensor that hangs on all others: what looks at them first."""

    def __call__(
        self, tensors: Pass, hyperparameters: Any, /
    ) -> Generator[Progress, None, Merge]: ...


def beside(weights: Tensor, taus: Tensor) -> Tensor:
    """λ [k] -> [k, 1, ...], to stand beside τ [k, ...]."""
    return weights.view(-1, *[1] * (taus.dim() - 1))


def weighted_sum(taus: Tensor, weights: Tensor) -> Tensor:
    """Σ λ τ, one version after the other, so that no more than one product is in memory."""
    total = taus[0] * weights[0]
    for tau, weight in zip(taus[1:], weights[1:], strict=True):
        total.add_(tau * weight)
    return total
