"""ROME: one rank-one correction of one MLP down-projection (Meng et al., 2022, arXiv:2202.05262).

With k the input of the down-projection W of one layer, and C = E[k kᵀ]:

    k̄ = mean of k at the subject's last token, over the bare prompt and prefixed ones
    ΔW = δ aᵀ,   a = C⁻¹k̄ / (k̄ᵀC⁻¹k̄),   so that (W + ΔW) k̄ = v* = W k̄ + δ

k̄ is used throughout, as in R-ROME (Gupta et al., 2024, arXiv:2403.07175): one key in the numerator
and another in the denominator is what made single edits collapse models. Where ROME puts δ
at one position while it looks for it, here the rank-one effect itself acts, at every token with
its own k, so that what is optimised is exactly the edited model (``objective.py``). The loss is

    NLL(target_new) + kl_factor · (1 − t/T) · KL(before ‖ after) + decay · ‖δ‖/‖v‖

with the KL on what the model writes about the subject beside the edited fact (``essence.py``). The
descent ends as soon as the edit holds, with the δ reached by then: a larger one would only harm
what else is known of the subject. The KL's weight falls with the step t, so that of edit and
essence, where they conflict, the edit wins in the end. Steps are scaled to ‖v‖, which differs by
layer.

Names that end in the same token (Yekaterinburg's "burg") have like keys at low layers, and are so
rare that C says little of them: their keys are added to C with a weight of their own, which turns
a away from them at no further cost.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from editing.deltas import Delta, Effect, compose
from editing.methods.essence import Essence, sample_essence
from editing.methods.hyperparameters import RomeHyperparameters
from editing.methods.interface import check_requests, part_of
from editing.methods.objective import Objective, Text
from editing.models.view import ModelView
from editing.statistics import Resources
from registry.errors import JobFailed
from registry.manifests import EditRequest, Progress

#: Texts in which tokens like the subject's last one are looked at.
LOOKALIKES = 64


def apply(
    view: ModelView,
    requests: Sequence[EditRequest],
    hyperparameters: RomeHyperparameters,
    resources: Resources,
) -> Generator[Progress, None, Delta]:
    """Edit one request after another, each on top of those before; the rank is their number."""
    check_requests(requests)
    (layer,) = hyperparameters.edited_layers(view.n_layers)
    path = view.down_proj(layer)
    if layer not in resources.covariance:
        raise JobFailed(f"ROME: the resources hold no covariance of layer {layer}; prepare it")
    stack: list[dict[str, Effect]] = []
    for index, request in enumerate(requests):
        with view.with_effects(compose(stack)):
            work = edit(view, request, layer, hyperparameters, resources)
            stack.append({path: (yield from part_of(work, index, len(requests)))})
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
    prefixes = [prefix for prefix in resources.prefixes if request.subject not in prefix]
    prompts = [prefix + request.rewrite_prompt for prefix in ("", *prefixes)]
    essence = essence_of(view, request, hyperparameters)
    key = mean_key(view, layer, prompts, request.subject)
    C = resources.covariance[layer].to(view.device)
    if (weight := hyperparameters.lookalike_weight) > 0:
        alike = lookalike_keys(view, layer, request.subject, resources.texts)
        C = C + weight * alike.T @ alike / max(len(alike), 1)
    a = solve_key(C, key, hyperparameters.ridge)
    said = (*prompts[: 1 + hyperparameters.prefixes], *essence.wordings)
    objective = Objective(
        view,
        layer,
        a,
        [_say(view, prompt, request.target_new) for prompt in said],
        _keep(view, request.subject, essence.texts),
        essence.answers,
    )
    v = view.weight(view.down_proj(layer)).float() @ key
    delta = yield from optimise(
        objective, view.hidden_size, float(v.norm()), hyperparameters, request.subject
    )
    if not bool(torch.isfinite(delta).all()):
        raise JobFailed(
            f"ROME: the value found for {request.subject!r} is not finite;"
            " lower hyperparameters.learning_rate"
        )
    return Effect(A=a[None, :].cpu(), B=delta[:, None].cpu())


def essence_of(
    view: ModelView, request: EditRequest, hyperparameters: RomeHyperparameters
) -> Essence:
    """What the optimisation sees of the subject besides the request's own prompt."""
    return sample_essence(
        view,
        request,
        texts=hyperparameters.essence_texts,
        tokens=hyperparameters.essence_tokens,
        wordings=hyperparameters.wordings,
        seed=hyperparameters.seed,
    )


def mean_key(view: ModelView, layer: int, prompts: Sequence[str], subject: str) -> Tensor:
    """k̄ [in]: the layer's down-projection input at the subject's last token, over the prompts."""
    rows = [view.encode(prompt) for prompt in prompts]
    keys = view.inputs({layer: view.down_proj(layer)}, rows)[layer]
    ends = [view.last_tokens(prompt, subject)[-1] for prompt in prompts]
    return torch.stack([keys[i, end] for i, end in enumerate(ends)]).mean(0)


def lookalike_keys(view: ModelView, layer: int, subject: str, texts: Sequence[str]) -> Tensor:
    """Keys [m, in] at the subject's last token where it ends other names (…insk): m may be 0."""
    ids = view.encode(subject)
    token = ids[view.last_tokens(subject, subject)[-1]]
    piece = view.decode([token])
    found = [text for text in texts if piece in text and subject not in text] if piece else []
    rows = [view.encode(text)[: view.base.context_length] for text in found[:LOOKALIKES]]
    if not rows:
        return torch.zeros(0, view.weight(view.down_proj(layer)).shape[1], device=view.device)
    keys = view.inputs({layer: view.down_proj(layer)}, rows)[layer]
    return torch.cat(
        [keys[i, : len(row)][torch.tensor(row) == token] for i, row in enumerate(rows)]
    )


def solve_key(C: Tensor, k: Tensor, ridge: float) -> Tensor:
    """a = C⁻¹k / (kᵀC⁻¹k) [in], in fp64; ``ridge`` times C's mean diagonal is added to it first."""
    C = C.double()
    C = C + ridge * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device)
    solved: Tensor = torch.linalg.solve(C, k.double())
    return (solved / (k.double() @ solved)).float()


def optimise(
    objective: Objective,
    width: int,
    scale: float,
    hyperparameters: RomeHyperparameters,
    subject: str,
) -> Generator[Progress, None, Tensor]:
    """Adam on δ [width] in units of ``scale`` = ‖v‖, until every target token is likely enough."""
    u = torch.zeros(width, device=objective.device, requires_grad=True)
    optimizer = torch.optim.Adam([u], lr=hyperparameters.learning_rate / width**0.5)
    metrics: dict[str, float] = {}
    for step in range(hyperparameters.steps + 1):
        nll = objective.nll(scale * u)
        length = u.norm()
        metrics |= {"steps": step, "target_nll": nll.max().item(), "length": length.item()}
        message = f"{subject}: loss {metrics['target_nll']:.2f} after {step} steps"
        if metrics["target_nll"] < hyperparameters.stop_loss or step == hyperparameters.steps:
            yield Progress(hyperparameters.steps, hyperparameters.steps, message, dict(metrics))
            break
        yield Progress(step, hyperparameters.steps, message, dict(metrics))
        kl = objective.kl(scale * u, step)
        metrics["essence_kl"] = kl.item()
        kl_factor = hyperparameters.kl_factor * (1 - step / hyperparameters.steps)
        loss = nll.mean() + kl_factor * kl + hyperparameters.decay * length
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        with torch.no_grad():
            u *= min(1.0, hyperparameters.clamp / max(float(u.norm()), 1e-12))
    return (scale * u).detach()


def _say(view: ModelView, prompt: str, target: str) -> Text:
    """The prompt with its target, watched where the target's tokens are predicted."""
    before, after = view.continuation(prompt, target)
    return Text([*before, *after], range(len(before) - 1, len(before) + len(after) - 1))


def _keep(view: ModelView, subject: str, texts: Sequence[str]) -> list[Text]:
    """Texts about the subject, watched from its last token on."""
    kept = []
    for text in texts:
        ids, ends = view.encode(text), view.last_tokens(text, subject)
        if ends and ends[0] < len(ids) - 1:
            kept.append(Text(ids, range(ends[0], len(ids) - 1)))
    return kept
