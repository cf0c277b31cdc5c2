"""A change of a weight as two factors: an effect's own where it is low-rank, else the nearest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from editing.deltas.effect import Effect

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


def factorised(effect: Effect, W: Tensor, rank: int) -> Factors:
    """The factors of an effect's ΔW on a weight W [out, in]: its own where they are all of it and
    within ``rank``, else ``truncated``."""
    is_low_rank = effect.scale is None and effect.dense is None and effect.sparse is None
    if effect.A is not None and effect.B is not None and is_low_rank and effect.rank <= rank:
        A, B = effect.A.double(), effect.B.double()
        return Factors(effect.A, effect.B, float(((B.T @ B) * (A @ A.T)).sum()))
    change = effect.change(W)
    return truncated(torch.zeros(W.shape) if change is None else change, rank)


def truncated(change: Tensor, rank: int) -> Factors:
    """The nearest B A to a ΔW [out, in], of the smallest rank that holds it and at most ``rank``.

    It is the truncated singular value decomposition (Eckart and Young 1936), B = U √S and
    A = √S⁻¹ Uᵀ ΔW, with U and S² of ΔW ΔWᵀ (or of the smaller ΔWᵀ ΔW), in fp64.
    """
    if change.shape[0] > change.shape[1]:
        found = truncated(change.T, rank)
        return Factors(found.B.T.contiguous(), found.A.T.contiguous(), found.energy, found.lost)
    wide = change.double()
    energies, vectors = torch.linalg.eigh(wide @ wide.T)
    energies, vectors = energies.flip(0).clamp(min=0), vectors.flip(1)
    total = float(energies.sum())
    left = total - energies.cumsum(0)
    enough = int((left > NEGLIGIBLE * total).sum()) + 1 if total else 1
    r = min(enough, rank, len(energies))
    root = energies[:r].clamp(min=torch.finfo(torch.float64).tiny) ** 0.25
    U, lost = vectors[:, :r], float(energies[r:].sum())
    return Factors(((U / root).T @ wide).float(), (U * root).float(), total, lost)
