"""A matrix as a product of low rank."""

from __future__ import annotations

import torch
from torch import Tensor

#: Singular values below this share of the largest are rounding.
NOTHING = 1e-6


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation B A of D [out, in] of at most that rank: B [out, r], A [r, in].

    It is the truncated singular value decomposition (Eckart and Young 1936), U_r and U_rᵀ D with
    U_r the leading eigenvectors of D Dᵀ (or of the smaller Dᵀ D), in fp64.
    """
    if matrix.shape[0] > matrix.shape[1]:
        A, B = truncated(matrix.T, rank)
        return B.T.contiguous(), A.T.contiguous()
    wide = matrix.double()
    energies, vectors = torch.linalg.eigh(wide @ wide.T)
    kept = (energies > max(float(energies[-1]), 0.0) * NOTHING**2).nonzero().flatten()
    B = vectors[:, kept[-rank:].flip(0)]
    return (B.T @ wide).float(), B.float()


def residual_energy(matrix: Tensor, A: Tensor, B: Tensor) -> tuple[float, float]:
    """‖D − B A‖² and ‖D‖²."""
    lost = torch.linalg.vector_norm(matrix - B @ A, dtype=torch.float64)
    whole = torch.linalg.vector_norm(matrix, dtype=torch.float64)
    return float(lost.square()), float(whole.square())
