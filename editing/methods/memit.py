"""MEMIT: many edits at once, spread over several layers (Meng et al., 2023, arXiv:2210.07229).

The change δ_i that makes edit i hold is optimised at the last edited layer for all edits as one
batch (``values.py``) and written into the layers' MLP down-projections: with K [in, n] the edits'
keys at a layer and R what is missing there divided by the layers left,

    ΔW = R Kᵀ (λ C + K Kᵀ)⁻¹,   C = E[k kᵀ]

in fp64, of rank n at most. Where one layer alone is edited, the solution is known but for R = Δ,
and Δ is optimised as the solution will apply it, at every token and for all edits together; for
several layers δ_i stands at the subject's last token meanwhile, as in the paper. λ is in units of
mean(k²) over C's mean diagonal, so that one value fits any layer of any model.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from editing.deltas import Delta, Effect
from editing.methods.essence import sample_essences
from editing.methods.hyperparameters import (
    MemitHyperparameters,
    SpreadHyperparameters,
    ValueHyperparameters,
)
from editing.methods.interface import Task, check_task, counted
from editing.methods.locate import (
    Place,
    Solve,
    Spread,
    check_covariances,
    check_spread,
    last_token_means,
    places,
    spread,
    with_lookalikes,
)
from editing.methods.values import (
    Goal,
    Text,
    Watched,
    at_token,
    by_key,
    check_finite,
    keep,
    optimise,
    say,
)
from editing.models.view import ModelView
from editing.statistics import Resources
from registry.errors import JobFailed
from registry.manifests import EditRequest, Progress

#: Edits whose values are optimised together; the memory of their texts bounds it.
TOGETHER = 100
#: Share of its mean diagonal that is added to a matrix without an inverse.
RIDGE = 1e-8


def apply(
    view: ModelView, task: Task, hyperparameters: MemitHyperparameters, resources: Resources
) -> Generator[Progress, None, Delta]:
    """Make all edits at once."""
    check_task(task, "subject")
    layers = hyperparameters.edited_layers(view.n_layers)
    check_covariances("MEMIT", resources, layers)
    subjects = [edit.subject for edit in task.edits]

    def solve(layer: int, K: Tensor) -> Tensor:
        C = with_lookalikes(view, layer, resources, subjects, hyperparameters.lookalike_weight)
        return solve_memit(C, K, hyperparameters.covariance_weight)

    result = yield from write_edits("MEMIT", view, task, hyperparameters, resources, solve)
    return Delta(result.effects, view.base.digest, "memit")


def solve_memit(C: Tensor, K: Tensor, weight: float) -> Tensor:
    """Z = (λC + K Kᵀ)⁻¹K [in, n] in fp64, λ = weight · mean(k²) / mean(diag C).

    Where neurons answer to nothing (of a ReLU), so that there is no inverse, ``RIDGE`` times the
    mean diagonal is added to it.

    Raises:
        JobFailed: there is none even so.
    """
    C = C.double()
    scale = K.square().mean() / C.diagonal().mean()
    M = weight * scale * C + K @ K.T
    solved: Tensor
    solved, singular = torch.linalg.solve_ex(M, K)
    if bool(singular):
        M.diagonal().add_(RIDGE * M.diagonal().mean())
        solved, singular = torch.linalg.solve_ex(M, K)
    if bool(singular):
        raise JobFailed(
            "MEMIT: C and the edits' keys have no inverse: the layer's MLP answers to no subject;"
            " give another layer"
        )
    return solved


def written(Z: Tensor, deltas: Tensor) -> Effect:
    """ΔW = Δᵀ Zᵀ as an effect: Z [in, n], Δ [n, out]."""
    return Effect(A=Z.T.contiguous().cpu(), B=deltas.T.contiguous().cpu())


def write_edits(
    method: str,
    view: ModelView,
    task: Task,
    hyperparameters: SpreadHyperparameters,
    resources: Resources,
    solve: Solve,
) -> Generator[Progress, None, Spread]:
    """Find every edit's δ and write it into the layers by ``solve``.

    In one layer Z = solve(K) is known before δ is, so that δ is optimised as the solution will
    apply it. For several layers it is optimised at the subject's last token, as in MEMIT.

    Raises:
        InvalidRequest: several layers of a family in which a change cannot be spread.
    """
    layers = hyperparameters.edited_layers(view.n_layers)
    check_spread(view, layers)
    found = places(view, task.edits, resources)
    if len(layers) > 1:
        deltas = yield from _find_values(
            method, view, layers[-1], task.edits, found, hyperparameters, None
        )
        return (yield from spread(view, layers, found, deltas, solve))
    (layer,) = layers
    path = view.down_proj(layer)
    K = last_token_means(view, {layer: path}, found)[layer].T
    Z = solve(layer, K.double()).float()
    deltas = yield from _find_values(method, view, layer, task.edits, found, hyperparameters, Z)
    return Spread({path: written(Z, deltas)}, {layer: K.contiguous().cpu()})


def _find_values(
    method: str,
    view: ModelView,
    layer: int,
    edits: Sequence[EditRequest],
    found: Sequence[Place],
    hyperparameters: ValueHyperparameters,
    Z: Tensor | None,
) -> Generator[Progress, None, Tensor]:
    """δ of each edit [n, hidden] at the layer's MLP output, by batches of ``TOGETHER``.

    With Z [in, n] a batch is optimised with the ones before it in place.
    """
    path = view.down_proj(layer)
    deltas = torch.zeros(0, view.hidden_size, device=view.device)
    for start in range(0, len(edits), TOGETHER):
        chosen = slice(start, start + TOGETHER)
        yield Progress(start, len(edits), "sampling what else is known of the subjects")
        before = {} if Z is None or not start else {path: written(Z[:, :start], deltas)}
        part = None if Z is None else Z[:, chosen]
        with view.with_effects(before):
            goals = goals_of(view, layer, edits[chosen], found[chosen], hyperparameters, part)
            work = optimise(view, layer, goals, hyperparameters)
            values = yield from counted(work, start, len(goals), len(edits))
        check_finite(method, edits[chosen], values.deltas)
        deltas = torch.cat([deltas, values.deltas])
    return deltas


def goals_of(
    view: ModelView,
    layer: int,
    edits: Sequence[EditRequest],
    found: Sequence[Place],
    hyperparameters: ValueHyperparameters,
    Z: Tensor | None = None,
) -> list[Goal]:
    """What the descent is to reach for each edit: by δ at the subject's last token or, with Z
    [in, n], by the change that the solution makes of all δ at every token."""
    essences = sample_essences(
        view,
        edits,
        texts=hyperparameters.essence_texts,
        tokens=hyperparameters.essence_tokens,
        wordings=hyperparameters.wordings,
        seed=hyperparameters.seed,
    )
    path = view.down_proj(layer)
    keys = last_token_means(view, {0: path}, [Place(p.prompts[:1], p.subject) for p in found])[0]
    scales = (keys @ view.weight(path).float().T).norm(dim=1).tolist()

    def changed(texts: list[Watched]) -> list[Text]:
        return at_token(view, texts) if Z is None else by_key(view, layer, Z, texts)

    goals = []
    for edit, place, essence, scale in zip(edits, found, essences, scales, strict=True):
        prompts = (*place.prompts[: 1 + hyperparameters.prefixes], *essence.wordings)
        said = [say(view, prompt, edit.target_new, edit.subject) for prompt in prompts]
        goals.append(
            Goal(
                edit.subject,
                changed(said),
                changed(keep(view, edit.subject, essence.texts)),
                essence.answers,
                scale,
            )
        )
    return goals
