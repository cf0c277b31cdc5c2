"""An effect as two factors: exactly where it is low-rank, else by a truncated SVD of its ΔW."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from editing.deltas import Effect

#: A rank is enough where at most this share of ‖ΔW‖_F² is left out: what fp32 cannot tell.
NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class Factors:
    """B A [out, in] for a ΔW.

    Attributes:
        A: [r, in]; ``B`` is [out, r].
        energy: ‖ΔW‖_F², of which ``lost`` is ‖ΔW − B A‖_F².
    """

    A: Tensor
    B: Tensor
    energy: float
    lost: float = 0.0

    @property
    def rank(self) -> int:
        return len(self.A)

    @property
    def residual_energy(self) -> float:
        """The share of ΔW that the factors do not hold."""
        return self.lost / self.energy if self.energy else 0.0


def weight_change(effect: Effect, W: Tensor) -> Tensor:
    """ΔW = (a − 1) ⊙ W + B A + D [out, in] in fp32, of an effect that nothing is later than."""
    W = W.float().cpu()
    change = effect.weight(torch.zeros_like(W))
    return change if effect.scale is None else change + (effect.scale - 1)[:, None] * W


def factorised(effect: Effect, W: Tensor, rank: int) -> Factors:
    """The factors of an effect's ΔW, of the smallest rank that holds it and at most ``rank``.

    A low-rank effect within ``rank`` keeps its own factors; any other ΔW = U S Vᵀ is cut to
    B = U √S, A = √S Vᵀ of its largest singular values, which no other matrix of that rank is
    nearer to (Eckart & Young 1936).
    """
    is_low_rank = effect.scale is None and effect.dense is None and effect.sparse is None
    if effect.A is not None and effect.B is not None and is_low_rank and effect.rank <= rank:
        A, B = effect.A.double(), effect.B.double()
        return Factors(effect.A, effect.B, float(((B.T @ B) * (A @ A.T)).sum()))
    U, S, Vh = torch.linalg.svd(weight_change(effect, W), full_matrices=False)
    energies = S.double().square()
    total = float(energies.sum())
    left = total - energies.cumsum(0)
    enough = int((left > NEGLIGIBLE * total).sum()) + 1 if total else 1
    r = min(enough, rank, len(S))
    root = S[:r].sqrt()
    lost = float(energies[r:].sum())
    return Factors(root[:, None] * Vh[:r], U[:, :r] * root, total, lost)
