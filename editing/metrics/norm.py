"""How large an update is beside the weights it changes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from editing.deltas import Effect
from editing.models.view import ModelView


@torch.no_grad()
def update_ratio(view: ModelView, effects: Mapping[str, Effect]) -> float | None:
    """The largest ‖ΔW‖_F / ‖W‖_F over the weights that effects change; None if they change none.

    Shifts and gates change no weight. A weight that was all zeros makes it infinite.
    """
    ratios = [
        _ratio(size, float(weight.double().norm()))
        for path, effect in effects.items()
        if (weight := view.matrix(path)) is not None
        for link in effect.links()
        if (size := update_norm(weight, link)) is not None
    ]
    if any(math.isnan(ratio) for ratio in ratios):
        return math.nan
    return max(ratios, default=None)


def _ratio(size: float, norm: float) -> float:
    if norm == 0:
        return size if size == 0 or math.isnan(size) else math.inf
    return size / norm


def update_norm(W: Tensor, effect: Effect) -> float | None:
    """‖ΔW‖_F in fp64, with ΔW = (a − 1) ⊙ W + B A + D; None where the effect has none of these.

    B A is never formed: ‖B A‖² = ⟨BᵀB, A Aᵀ⟩ and ⟨D, B A⟩ = ⟨D Aᵀ, B⟩.

    Args:
        W: [out, in]; a norm's weight is [out, 1].
    """
    D = _fixed(W, effect)
    if D is None and effect.A is None:
        return None
    total = W.new_zeros((), dtype=torch.float64)
    if D is not None:
        total = total + D.square().sum()
    if effect.A is not None and effect.B is not None:
        A, B = (part.to(W.device, torch.float64) for part in (effect.A, effect.B))
        total = total + ((B.T @ B) * (A @ A.T)).sum()
        if D is not None:
            total = total + 2 * ((D @ A.T) * B).sum()
    return math.sqrt(max(float(total), 0.0)) if not total.isnan() else math.nan


def _fixed(W: Tensor, effect: Effect) -> Tensor | None:
    """(a − 1) ⊙ W + D [out, in] in fp64."""
    parts = []
    if effect.scale is not None:
        parts.append((effect.scale.to(W.device, torch.float64) - 1)[:, None] * W.double())
    if effect.dense is not None:
        parts.append(effect.dense.to(W.device, torch.float64))
    if effect.sparse is not None:
        parts.append(effect.sparse.dense().to(W.device, torch.float64))
    return sum(parts[1:], parts[0]) if parts else None
