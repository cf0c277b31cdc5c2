"""GRACE: a codebook that replaces what a layer says near its keys (Hartvigsen et al. 2023).

"Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors", arXiv:2211.11031. The
output of one layer's MLP down-projection at input x becomes the value of the nearest key k where
‖x - k‖ <= ε, and stays what it was elsewhere. A key is the input at a prompt's last token; its
value is v + δ with v what was said there and δ what must be added for the target to be said
(``values.py``; all of them as one batch).

An edit whose ball meets the nearest key's opens no entry where both say the same: that key's ball
grows to reach it. Where they say different things, both balls shrink to half the distance. The
radius that an edit begins with is a share of its key's length, so that one value fits any model,
and balls are never made larger by a split, as the reference's may be.

Replacing closes the part of a stack that composes: what comes after it stays apart.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Sequence

import torch
from torch import Tensor

from editing.deltas import Delta, Effect, Gate
from editing.methods.hyperparameters import GraceHyperparameters
from editing.methods.interface import Task
from editing.methods.triggers import check_prompts, find_values, last_inputs, trigger_rows
from editing.models.probing import outputs
from editing.models.view import ModelView
from editing.statistics import Resources
from registry.manifests import Progress


def apply(
    view: ModelView,
    task: Task,
    hyperparameters: GraceHyperparameters,
    resources: Resources,
) -> Generator[Progress, None, Delta]:
    """One entry an edit, less those that another's reaches."""
    check_prompts(view, task)
    triggers = trigger_rows(view, task.edits)
    (layer,) = hyperparameters.edited_layers(view.n_layers)
    path = view.down_proj(layer)
    keys = last_inputs(view, path, triggers)
    said = [view.continuation(edit.rewrite_prompt, edit.target_new) for edit in task.edits]
    left = [(*p, *t)[len(row) :] for (p, t), row in zip(said, triggers, strict=True)]
    book = codebook(keys, left, hyperparameters.radius * keys.norm(dim=1))
    entries = list(book)
    chosen, ends = [task.edits[i] for i in entries], [triggers[i] for i in entries]
    deltas = yield from find_values("grace", view, layer, chosen, ends, hyperparameters)
    gate = Gate(
        keys[entries],
        torch.tensor(list(book.values()), device=keys.device),
        outputs(view, path, keys[entries]) + deltas,
        activation="nearest",
    )
    return Delta({path: Effect(gates=(gate.map(Tensor.cpu),))}, view.base.digest, "grace")


def codebook(keys: Tensor, targets: Sequence[Hashable], radii: Tensor) -> dict[int, float]:
    """Which edits have an entry, with its ε, after taking them in one by one.

    Args:
        keys: of the edits [n, in].
        targets: what each is to say from there on.
        radii: the ε that each begins with [n].
    """
    far = torch.cdist(keys, keys, compute_mode="donot_use_mm_for_euclid_dist").tolist()
    book: dict[int, float] = {}
    for i, radius in enumerate(radii.tolist()):
        nearest = min(book, key=lambda j: far[i][j], default=i)
        distance = far[i][nearest]
        if nearest == i or distance > book[nearest] + radius:
            book[i] = radius
        elif targets[nearest] == targets[i]:
            book[nearest] = max(book[nearest], distance)
        else:
            book[nearest] = min(book[nearest], distance / 2)
            book[i] = min(radius, distance / 2)
    return book
