"""Locate-then-edit: keys at subjects' last tokens, and a change of several layers that adds up.

With K [in, n] the keys of n edits at one layer and R [out, n] what its output is to change by at
them, a method solves for Z [in, n] and changes W by R Zᵀ: low-rank, whatever n is.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editing.deltas import Effect
from editing.metrics.targets import batches
from editing.models.view import ModelView
from editing.statistics import Resources
from registry.errors import InvalidRequest, JobFailed
from registry.manifests import EditRequest, Progress

#: Texts in which tokens like a subject's last one are looked at.
LOOKALIKES = 64
#: A layer and its keys K [in, n] in fp64 -> Z [in, n].
Solve = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Place:
    """Prompts of one edit in which its subject's last token is looked up; the bare one first."""

    prompts: Sequence[str]
    subject: str


@dataclass(frozen=True)
class Spread:
    """Attributes:
    effects: a low-rank effect of each layer's down-projection.
    keys: by layer, the mean keys K of the edits [in, n], fp32.
    """

    effects: dict[str, Effect]
    keys: dict[int, Tensor]


def places(view: ModelView, edits: Sequence[EditRequest], resources: Resources) -> list[Place]:
    """Where each edit's subject stands: in its bare prompt, and behind each of the prefixes that do
    not name it and leave room for the target in the base's context."""
    return [
        Place(
            [edit.rewrite_prompt]
            + [
                prefix + edit.rewrite_prompt
                for prefix in resources.prefixes
                if edit.subject not in prefix and _fits(view, prefix, edit)
            ],
            edit.subject,
        )
        for edit in edits
    ]


def _fits(view: ModelView, prefix: str, edit: EditRequest) -> bool:
    before, target = view.continuation(prefix + edit.rewrite_prompt, edit.target_new)
    return len(before) + len(target) <= view.base.context_length


def check_covariances(method: str, resources: Resources, layers: Sequence[int]) -> None:
    """Raises JobFailed where C of a layer is missing."""
    for layer in layers:
        if layer not in resources.covariance:
            raise JobFailed(
                f"{method}: the resources hold no covariance of layer {layer}; prepare it"
            )


def check_spread(view: ModelView, layers: Sequence[int]) -> None:
    """Refuse several layers of a family whose MLP output passes a norm: shares of a change do not
    add up there. Raises InvalidRequest."""
    if len(layers) > 1 and view.paths.post_norm:
        raise InvalidRequest(
            f"base {view.base.name!r}: the MLP's output passes a norm, so that a change cannot be"
            " spread over layers; give one layer",
            param="hyperparameters.layers",
        )


def last_token_means(
    view: ModelView, paths: dict[int, str], found: Sequence[Place]
) -> dict[int, Tensor]:
    """Mean inputs of modules at the subjects' last tokens: [n, in] in fp32 by key of ``paths``."""
    texts = [(i, p, place.subject) for i, place in enumerate(found) for p in place.prompts]
    rows = [view.encode(prompt) for _, prompt, _ in texts]
    counts = torch.tensor([len(place.prompts) for place in found], device=view.device)
    sums: dict[int, Tensor] = {}
    for batch in batches([len(row) for row in rows]):
        owners = torch.tensor([texts[i][0] for i in batch], device=view.device)
        ends = [view.last_tokens(texts[i][1], texts[i][2])[-1] for i in batch]
        for key, inputs in view.inputs(paths, [rows[i] for i in batch]).items():
            taken = inputs[torch.arange(len(batch)), ends]
            if key not in sums:
                sums[key] = torch.zeros(len(found), taken.shape[1], device=view.device)
            sums[key].index_add_(0, owners, taken)
    return {key: total / counts[:, None] for key, total in sums.items()}


def spread(
    view: ModelView,
    layers: Sequence[int],
    found: Sequence[Place],
    deltas: Tensor,
    solve: Solve,
) -> Generator[Progress, None, Spread]:
    """Change ``layers`` so that the output of the last one changes by ``deltas`` [n, hidden].

    As in MEMIT: layer by layer upwards, each takes its share of what is still missing at the
    subjects' last tokens in the bare prompts.
    """
    bare = [Place(place.prompts[:1], place.subject) for place in found]
    out = after(view, layers[-1])
    start = _outputs(view, out, bare)
    effects: dict[str, Effect] = {}
    keys: dict[int, Tensor] = {}
    for done, layer in enumerate(layers):
        yield Progress(done, len(layers), f"solving for layer {layer}")
        with view.with_effects(effects):
            K = last_token_means(view, {layer: view.down_proj(layer)}, found)[layer].T
            reached = _outputs(view, out, bare) - start if done else torch.zeros_like(deltas)
        R = (deltas - reached) / (len(layers) - done)
        Z = solve(layer, K.double())
        effects[view.down_proj(layer)] = Effect(
            A=Z.T.float().contiguous().cpu(), B=R.T.contiguous().cpu()
        )
        keys[layer] = K.contiguous().cpu()
    return Spread(effects, keys)


def after(view: ModelView, layer: int) -> str:
    """The module that is given what a layer puts out."""
    if layer + 1 < view.n_layers:
        return f"{view.paths.layers}.{layer + 1}"
    return view.paths.last[0]


def _outputs(view: ModelView, path: str, found: Sequence[Place]) -> Tensor:
    return last_token_means(view, {0: path}, found)[0]


def with_lookalikes(
    view: ModelView, layer: int, resources: Resources, subjects: Sequence[str], weight: float
) -> Tensor:
    """C of a layer, and ``weight`` times E[k kᵀ] over names that end in a subject's last token.

    Yekaterinburg's "burg" has keys like those of other names in "burg" at low layers, and they are
    so rare that C says little of them: with a weight of their own they turn a solution away from
    them at no further cost. Each last token counts once.
    """
    C = resources.covariance[layer].to(view.device)
    if weight == 0:
        return C
    by_token = {view.encode(s)[view.last_tokens(s, s)[-1]]: s for s in subjects}
    for subject in by_token.values():
        alike = lookalike_keys(view, layer, subject, resources.texts)
        C = C + weight * alike.T @ alike / max(len(alike), 1)
    return C


def lookalike_keys(view: ModelView, layer: int, subject: str, texts: Sequence[str]) -> Tensor:
    """Keys [m, in] at the subject's last token where it ends other names (…insk): m may be 0."""
    ids = view.encode(subject)
    token = ids[view.last_tokens(subject, subject)[-1]]
    piece = view.decode([token])
    found = [text for text in texts if piece in text and subject not in text] if piece else []
    rows = [view.excerpt(text) for text in found[:LOOKALIKES]]
    if not rows:
        return torch.zeros(0, view.weight(view.down_proj(layer)).shape[1], device=view.device)
    keys = view.inputs({layer: view.down_proj(layer)}, rows)[layer]
    return torch.cat(
        [keys[i, : len(row)][torch.tensor(row) == token] for i, row in enumerate(rows)]
    )
