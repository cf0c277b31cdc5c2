"""AlphaEdit: edits within the null space of what is to be kept (Fang et al., 2024,
arXiv:2410.02355).

P projects on the directions in which C = E[k kᵀ] has next to nothing. With K [in, n] the edits'
keys at a layer, R [out, n] what is missing there divided by the layers left, and C_p = Σ K Kᵀ over
the AlphaEdit deltas beneath in the stack,

    [P (K Kᵀ + C_p) + λ I] X = P K Rᵀ,   ΔW = Xᵀ,   so that ΔW (I - P) = 0

Each delta carries its keys K as state, so that C_p belongs to the stack: what is rolled back or
taken out takes its keys along. Where the reference cuts C's singular values at 0.02, the threshold
is here a share of their mean: scales differ by layer and model.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from editing.deltas import Delta
from editing.methods.hyperparameters import AlphaEditHyperparameters
from editing.methods.interface import Task, check_task
from editing.methods.locate import check_covariances, with_lookalikes
from editing.methods.memit import write_edits
from editing.models.view import ModelView
from editing.statistics import Resources
from registry.manifests import Progress

METHOD = "alphaedit"


def apply(
    view: ModelView, task: Task, hyperparameters: AlphaEditHyperparameters, resources: Resources
) -> Generator[Progress, None, Delta]:
    """Make all edits at once."""
    check_task(task, "subject")
    layers = hyperparameters.edited_layers(view.n_layers)
    check_covariances("AlphaEdit", resources, layers)
    subjects = [edit.subject for edit in task.edits]

    def solve(layer: int, K: Tensor) -> Tensor:
        C = with_lookalikes(view, layer, resources, subjects, hyperparameters.lookalike_weight)
        P = null_space(C, hyperparameters.null_threshold)
        earlier = earlier_keys(task.stack, layer)
        before = None if earlier is None else earlier.to(K)
        return solve_alphaedit(P, K, before, hyperparameters.ridge)

    result = yield from write_edits("AlphaEdit", view, task, hyperparameters, resources, solve)
    state = {f"keys/{layer}": K for layer, K in result.keys.items()}
    return Delta(result.effects, view.base.digest, METHOD, state)


def null_space(C: Tensor, threshold: float) -> Tensor:
    """P [in, in] in fp64: onto eigenvectors of C below ``threshold`` times its mean eigenvalue."""
    values, vectors = torch.linalg.eigh(C.double())
    chosen: Tensor = vectors[:, values < threshold * values.mean()]
    return chosen @ chosen.T


def earlier_keys(stack: Sequence[Delta], layer: int) -> Tensor | None:
    """The keys [in, m] that AlphaEdit deltas of a stack carry for a layer; None without any."""
    found = [d.state[f"keys/{layer}"] for d in stack if f"keys/{layer}" in d.state]
    return torch.cat(found, dim=1) if found else None


def solve_alphaedit(P: Tensor, K: Tensor, earlier: Tensor | None, ridge: float) -> Tensor:
    """Z = [P (K Kᵀ + C_p) + λI]⁻¹ P K [in, n] in fp64, λ = ridge · mean(‖k‖²)."""
    M = K @ K.T if earlier is None else K @ K.T + earlier @ earlier.T
    scale = ridge * K.square().sum(0).mean()
    eye = torch.eye(len(P), dtype=P.dtype, device=P.device)
    solved = torch.linalg.solve(P @ M @ P + scale * eye, P @ K)  # the same, as X = P X
    inside: Tensor = P @ solved  # it lies there already but for rounding
    return inside
