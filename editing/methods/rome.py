"""ROME: one rank-one correction of one MLP down-projection (Meng et al., 2022, arXiv:2202.05262).

With k the input of the down-projection W of one layer, and C = E[k kᵀ]:

    k̄ = mean of k at the subject's last token, over the bare prompt and prefixed ones
    ΔW = δ aᵀ,   a = C⁻¹k̄ / (k̄ᵀC⁻¹k̄),   so that (W + ΔW) k̄ = v* = W k̄ + δ

k̄ is used throughout, as in R-ROME (Gupta et al., 2024, arXiv:2403.07175): one key in the numerator
and another in the denominator is what made single edits collapse models. Where ROME puts δ
at one position while it looks for it, here the rank-one effect itself acts, at every token with
its own k, so that what is optimised is exactly the edited model (``values.py``). The loss is

    NLL(target_new) + kl_factor · (1 − t/T) · KL(before ‖ after) + decay · ‖δ‖/‖v‖

with the KL on what the model writes about the subject beside the edited fact (``essence.py``). The
descent ends as soon as the edit holds, with the δ reached by then: a larger one would only harm
what else is known of the subject. The KL's weight falls with the step t, so that of edit and
essence, where they conflict, the edit wins in the end. Steps are scaled to ‖v‖, which differs by
layer.

C holds the keys of names that end in the same token as well (``locate.with_lookalikes``).
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from editing.deltas import Delta, Effect, compose
from editing.methods.essence import Essence, sample_essences
from editing.methods.hyperparameters import RomeHyperparameters
from editing.methods.interface import Task, check_task, part_of
from editing.methods.locate import check_covariances, last_token_means, places, with_lookalikes
from editing.methods.values import Goal, by_key, check_finite, keep, optimise, say
from editing.models.view import ModelView
from editing.statistics import Resources
from registry.errors import JobFailed
from registry.manifests import EditRequest, Progress


def apply(
    view: ModelView,
    task: Task,
    hyperparameters: RomeHyperparameters,
    resources: Resources,
) -> Generator[Progress, None, Delta]:
    """Make one edit after another, each on top of those before; the rank is their number."""
    check_task(task, "subject")
    (layer,) = hyperparameters.edited_layers(view.n_layers)
    path = view.down_proj(layer)
    check_covariances("ROME", resources, (layer,))
    stack: list[dict[str, Effect]] = []
    for index, request in enumerate(task.edits):
        with view.with_effects(compose(stack)):
            work = edit(view, request, layer, hyperparameters, resources)
            stack.append({path: (yield from part_of(work, index, len(task.edits)))})
    return Delta(compose(stack), view.base.digest, "rome")


def edit(
    view: ModelView,
    request: EditRequest,
    layer: int,
    hyperparameters: RomeHyperparameters,
    resources: Resources,
) -> Generator[Progress, None, Effect]:
    """The rank-one effect of one request."""
    yield Progress(
        0, hyperparameters.steps, f"{request.subject}: sampling what else is known of it"
    )
    (place,) = places(view, [request], resources)
    essence = essence_of(view, request, hyperparameters)
    key = last_token_means(view, {layer: view.down_proj(layer)}, [place])[layer][0]
    C = with_lookalikes(view, layer, resources, [request.subject], hyperparameters.lookalike_weight)
    a = solve_key(C, key, hyperparameters.ridge)
    said = (*place.prompts[: 1 + hyperparameters.prefixes], *essence.wordings)
    v = view.weight(view.down_proj(layer)).float() @ key
    goal = Goal(
        request.subject,
        by_key(view, layer, a, [say(view, prompt, request.target_new) for prompt in said]),
        by_key(view, layer, a, keep(view, request.subject, essence.texts)),
        essence.answers,
        float(v.norm()),
    )
    values = yield from optimise(view, layer, [goal], hyperparameters)
    check_finite("ROME", [request], values.deltas)
    return Effect(A=a[None, :].cpu(), B=values.deltas.T.cpu())


def essence_of(
    view: ModelView, request: EditRequest, hyperparameters: RomeHyperparameters
) -> Essence:
    """What the optimisation sees of the subject besides the request's own prompt."""
    (essence,) = sample_essences(
        view,
        [request],
        texts=hyperparameters.essence_texts,
        tokens=hyperparameters.essence_tokens,
        wordings=hyperparameters.wordings,
        seed=hyperparameters.seed,
    )
    return essence


def solve_key(C: Tensor, k: Tensor, ridge: float) -> Tensor:
    """a = C⁻¹k / (kᵀC⁻¹k) [in], in fp64; ``ridge`` times C's mean diagonal is added to it first.

    Raises:
        JobFailed: C has no inverse.
    """
    C = C.double()
    C = C + ridge * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device)
    solved: Tensor
    solved, singular = torch.linalg.solve_ex(C, k.double())
    if bool(singular):
        raise JobFailed(
            "ROME: C has no inverse, since there are neurons that ordinary text never reaches; give"
            " hyperparameters.ridge above 0"
        )
    return (solved / (k.double() @ solved)).float()
