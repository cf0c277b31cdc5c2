"""Merges by angles between changes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from editing.merging.hyperparameters import MergeHyperparameters

#: Beyond this cosine the arc is as good as straight.
STRAIGHT = 0.9995


def slerp(
    taus: Tensor, weights: Tensor, hyperparameters: MergeHyperparameters, draws: Sequence[Generator]
) -> Tensor:
    """sin((1−t)θ)/sin θ · τ₀ + sin(tθ)/sin θ · τ₁ with t = λ₁/(λ₀+λ₁), θ the angle between the two
    changes of a tensor (Shoemake 1985). τ [2, ...] -> [...].

    (1−t) τ₀ + t τ₁ where |cos θ| > 0.9995, and where a change is zero and has no direction.
    mergekit takes the arc between whole weights, which hardly differ in direction; here it is that
    between changes.
    """
    total = float(weights.sum())
    t = float(weights[1]) / total if total > 0 else 0.5
    cosine = float(cosines(taus)[0, 1])
    if math.isnan(cosine) or abs(cosine) > STRAIGHT:
        return torch.lerp(taus[0], taus[1], t)
    theta = math.acos(cosine)
    return (math.sin((1 - t) * theta) * taus[0] + math.sin(t * theta) * taus[1]) / math.sin(theta)


def model_stock(
    taus: Tensor, weights: Tensor, hyperparameters: MergeHyperparameters, draws: Sequence[Generator]
) -> Tensor:
    """t · mean τ with t = N c / (1 + (N−1) c), c the mean cosine between the N changes of a tensor
    (Jang et al. 2024, arXiv:2403.19522). It has no weights.

    A change that is zero has the cosine 0 with the others; c below 0, of which the paper knows
    nothing, counts as 0, so that t is from 0 to 1.
    """
    count = len(taus)
    if count == 1:
        return taus[0]
    pairs = torch.triu_indices(count, count, 1)
    c = float(cosines(taus)[pairs[0], pairs[1]].nan_to_num(0.0).mean().clamp(0, 1))
    return taus.mean(0) * (count * c / (1 + (count - 1) * c))


def cosines(taus: Tensor) -> Tensor:
    """[k, k] in fp64 between changes [k, ...]; NaN where one of the two is zero."""
    return cosine_matrix(gram(taus))


def cosine_matrix(gram: Tensor) -> Tensor:
    """Inner products [k, k] -> cosines, NaN where one of the two has no length."""
    norms = gram.diagonal().sqrt()
    return (gram / norms[:, None] / norms).clamp(-1, 1)


def gram(taus: Tensor, numbers: int = 2**20) -> Tensor:
    """⟨τ_i, τ_j⟩ [k, k] in fp64, so many numbers at a time."""
    flat = taus.flatten(1)
    total = taus.new_zeros((len(taus), len(taus)), dtype=torch.float64)
    for part in torch.split(flat, max(1, numbers // len(taus)), dim=1):
        wide = part.double()
        total += wide @ wide.T
    return total
