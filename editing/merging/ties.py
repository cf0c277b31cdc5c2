"""TIES: trim, elect a sign, merge what agrees (Yadav et al. 2023, arXiv:2306.01708)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from editing.merging.hyperparameters import ElectHyperparameters, TiesHyperparameters
from editing.merging.interface import beside


def ties(
    taus: Tensor, weights: Tensor, hyperparameters: TiesHyperparameters, draws: Sequence[Generator]
) -> Tensor:
    """Of each τ [...] the largest entries, then ``elected``.

    The largest are taken tensor by tensor, as mergekit and peft do, at least one of each; the
    paper takes them of the whole model.
    """
    for tau in taus:
        trim_(tau, hyperparameters.density)
    return elected(taus, weights, hyperparameters)


def trim_(tau: Tensor, density: float) -> None:
    """Sets all but the ``density`` largest entries of τ [...] to zero."""
    if density >= 1:
        return
    flat = tau.view(-1)
    kept = flat.abs().topk(max(1, int(density * flat.numel())), sorted=False).indices
    values = flat[kept]
    flat.zero_()
    flat[kept] = values


def elected(taus: Tensor, weights: Tensor, hyperparameters: ElectHyperparameters) -> Tensor:
    """The weighted sum of the entries whose sign is the elected one, divided. τ [k, ...] -> [...].

    With γ = sgn Σ λτ (on ``changes``: sgn Σ τ; by ``count``: the sign that more have; + where both
    are equal) and m = [sgn τ = γ]: Σ m λτ over Σ m λ (``weights``), Σ m (``count``) or 1. The paper
    has no weights, and is ``changes`` with ``count``; so is peft, mergekit is ``weighted`` with
    ``weights``. Where nothing agrees the change is zero.
    """
    lambdas = beside(weights, taus)
    weighs_first = hyperparameters.elect_on == "weighted"
    if weighs_first:
        taus.mul_(lambdas)
    votes = taus.sign() if hyperparameters.majority == "count" else taus
    positive = votes.sum(0) >= 0
    agreeing = torch.where(positive, taus > 0, taus < 0)
    if not weighs_first:
        taus.mul_(lambdas)
    total = taus.mul_(agreeing).sum(0)
    if hyperparameters.divide_by == "none":
        return total
    if hyperparameters.divide_by == "count":
        return total / agreeing.sum(0).clamp(min=1)
    divisor = torch.einsum("k,k...->...", weights, agreeing.to(weights.dtype))
    return total / divisor.masked_fill_(divisor == 0, 1)
