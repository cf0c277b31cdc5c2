"""Merges that drop entries of each change first: at random, or by their magnitude."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from editing.merging.hyperparameters import (
    BreadcrumbsHyperparameters,
    DareHyperparameters,
    DareTiesHyperparameters,
    DellaHyperparameters,
    DellaLinearHyperparameters,
)
from editing.merging.interface import weighted_sum
from editing.merging.ties import elected


def dare(
    taus: Tensor, weights: Tensor, hyperparameters: DareHyperparameters, draws: Sequence[Generator]
) -> Tensor:
    """Σ λ m τ / p with m ~ Bernoulli(p), p the density (DARE, Yu et al. 2024, arXiv:2311.03099).

    The paper and peft divide by p, as here; mergekit instead restores the L1 norm of each tensor.
    """
    _drop_evenly_(taus, hyperparameters, draws)
    return weighted_sum(taus, weights)


def dare_ties(
    taus: Tensor,
    weights: Tensor,
    hyperparameters: DareTiesHyperparameters,
    draws: Sequence[Generator],
) -> Tensor:
    """DARE's m τ / p, of which the entries of the elected sign are taken (``ties.elected``).

    By default their sum, as mergekit has it; peft divides it by how many agree.
    """
    _drop_evenly_(taus, hyperparameters, draws)
    return elected(taus, weights, hyperparameters)


def della(
    taus: Tensor, weights: Tensor, hyperparameters: DellaHyperparameters, draws: Sequence[Generator]
) -> Tensor:
    """MagPrune's entries (``_drop_by_rank_``), of which those of the elected sign are taken, as
    DELLA has it (Deep et al. 2024, arXiv:2406.11617)."""
    _drop_by_rank_(taus, hyperparameters, draws)
    return elected(taus, weights, hyperparameters)


def della_linear(
    taus: Tensor,
    weights: Tensor,
    hyperparameters: DellaLinearHyperparameters,
    draws: Sequence[Generator],
) -> Tensor:
    """The weighted sum of MagPrune's entries, without an election of signs."""
    _drop_by_rank_(taus, hyperparameters, draws)
    return weighted_sum(taus, weights)


def breadcrumbs(
    taus: Tensor,
    weights: Tensor,
    hyperparameters: BreadcrumbsHyperparameters,
    draws: Sequence[Generator],
) -> Tensor:
    """Σ λ m τ, m without the largest γ of a tensor's entries, nor the smallest beyond the density
    (Davari and Belilovsky 2024, arXiv:2312.06795). Where both shares are more than there is, fewer
    of the largest are left out, as mergekit has it."""
    for tau in taus:
        flat = tau.view(-1)
        count = flat.numel()
        kept = max(1, int(hyperparameters.density * count))
        largest = min(int(hyperparameters.gamma * count), count - kept)
        order = flat.abs().argsort(stable=True)
        flat[order[: count - kept - largest]] = 0
        flat[order[count - largest :]] = 0
    return weighted_sum(taus, weights)


def _drop_evenly_(taus: Tensor, own: DareHyperparameters, draws: Sequence[Generator]) -> None:
    if own.density >= 1:
        return
    for tau, draw in zip(taus, draws, strict=True):
        tau.mul_(torch.bernoulli(torch.full_like(tau, own.density), generator=draw))
    if own.rescale:
        taus.div_(own.density)


def _drop_by_rank_(
    taus: Tensor, own: DellaLinearHyperparameters, draws: Sequence[Generator]
) -> None:
    """MagPrune: an entry of rank i of n in its row (0 is the smallest) is kept with probability
    p_i = p − ε + 2ε i/(n−1) and divided by it. ε is half the window's width, as in mergekit, which
    does not divide but restores the L1 norm; a row of one entry has p."""
    for tau, draw in zip(taus, draws, strict=True):
        rows = tau.view(1, -1) if tau.dim() < 2 else tau
        ranks = rows.abs().argsort(dim=-1, stable=True).argsort(dim=-1)
        last = rows.shape[-1] - 1
        shares = ranks / last if last else torch.full_like(rows, 0.5)
        keep = (own.density + own.epsilon * (2 * shares - 1)).clamp_(0, 1)
        rows.mul_(torch.bernoulli(keep, generator=draw))
        if own.rescale:
            rows.div_(keep)
