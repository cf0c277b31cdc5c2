"""Sums and means of changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from editing.merging.hyperparameters import MergeHyperparameters, MosHyperparameters
from editing.merging.interface import weighted_sum


def task_arithmetic(
    taus: Tensor, weights: Tensor, hyperparameters: MergeHyperparameters, draws: Sequence[Generator]
) -> Tensor:
    """Σ λ τ (Ilharco et al. 2023, arXiv:2212.04089). τ [k, ...], λ [k] -> [...]."""
    return weighted_sum(taus, weights)


def linear(
    taus: Tensor, weights: Tensor, hyperparameters: MergeHyperparameters, draws: Sequence[Generator]
) -> Tensor:
    """Σ λ τ / Σ λ (model soups, Wortsman et al. 2022, arXiv:2203.05482); the sum where the weights
    come to nothing, as mergekit has it."""
    total = float(weights.sum())
    return weighted_sum(taus, weights) / (total if abs(total) >= 1e-8 else 1.0)


def mos(
    taus: Tensor, weights: Tensor, hyperparameters: MosHyperparameters, draws: Sequence[Generator]
) -> Tensor:
    """(1 − α) τ_new + α mean(τ_old); the last version is the new one. It has no weights."""
    return torch.lerp(taus[-1], taus[:-1].mean(0), hyperparameters.alpha)
