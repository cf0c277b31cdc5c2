"""Wanda: prune the weights that matter least to what a linear puts out (Sun et al., 2023,
arXiv:2306.11695).

A weight's score is its size times that of what it is multiplied with,

    S_ij = |W_ij| · ‖X_j‖₂,

with X_j the j-th input at every token of some texts. In each row of W, one output, the share
``sparsity`` of the lowest scores goes. As in the paper layers are pruned from below, each looking
at what comes out of those already pruned, and no weight is trained afterwards.

At low sparsity (10 to 30 %) this protects an aligned model: it withstands more of what is to make
it harmful and keeps its abilities, without any training (Hasan et al., 2024, arXiv:2401.10862).

W is the weight with the stack beneath, a ⊙ W + B A + D, so that the delta, ΔW = −W_ij at what is
pruned, leaves zeros of the composed version. It is kept as a sparse effect of 8 bytes an entry, and
as a dense one from a quarter of the entries on; a mask of one bit a weight would be smaller on
disk, but would have to be undone into these numbers wherever the version is loaded.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from editing.deltas import Delta, Effect, compose
from editing.finetune.adapter import layer_of, linears
from editing.methods.hyperparameters import WandaHyperparameters
from editing.methods.interface import Task
from editing.metrics.sampling import spaced
from editing.metrics.targets import batches
from editing.models.view import ModelView
from editing.statistics import Resources
from registry.errors import InvalidRequest, JobFailed
from registry.manifests import Progress

METHOD = "wanda"


def apply(
    view: ModelView, task: Task, hyperparameters: WandaHyperparameters, resources: Resources
) -> Generator[Progress, None, Delta]:
    """Prune the linears of some layers by ``task.texts``, or the base's own texts without any.

    Raises:
        InvalidRequest: no text has a token, no linear has a name that was asked for, or one has
            an effect that replaces what it puts out.
        JobFailed: nothing is pruned.
    """
    rows = _rows(view, task.texts or resources.texts, hyperparameters.samples)
    layers = hyperparameters.edited_layers(view.n_layers)
    paths = linears(view, hyperparameters.target_modules)
    below = compose(delta.effects for delta in task.stack)
    effects: dict[str, Effect] = {}
    pruned = total = 0
    for done, layer in enumerate(layers):
        yield Progress(done, len(layers), f"pruning layer {layer}")
        chosen = [path for path in paths if layer_of(view, path) == layer]
        with view.with_effects(effects):
            norms = input_norms(view, chosen, rows)
        for path in chosen:
            weight = weight_of(view, path, below.get(path, Effect()))
            mask = lowest(weight.abs() * norms[path], hyperparameters.sparsity)
            effects[path] = Effect(dense=torch.where(mask, -weight, 0.0)).compact()
            pruned, total = pruned + int(mask.sum()), total + mask.numel()
    if not pruned:
        raise JobFailed(
            f"wanda: sparsity {hyperparameters.sparsity:g} prunes none of {total} weights; raise"
            " hyperparameters.sparsity, or choose other layers and target_modules"
        )
    told = f"pruned {pruned} of {total} weights"
    yield Progress(len(layers), len(layers), told, {"pruned": pruned, "sparsity": pruned / total})
    return Delta(effects, view.base.digest, METHOD)


@torch.no_grad()
def input_norms(
    view: ModelView, paths: Sequence[str], rows: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """‖X_j‖₂ of what each linear is given over all tokens of rows: [in] in fp32 by path."""
    named = dict(enumerate(paths))
    squares: dict[int, Tensor] = {}
    for batch in batches([len(row) for row in rows]):
        lengths = torch.tensor([len(rows[i]) for i in batch])
        for key, x in view.inputs(named, [rows[i] for i in batch]).items():
            real = torch.arange(x.shape[1]) < lengths[:, None]
            squares[key] = squares.get(key, 0) + x[real.to(x.device)].double().square().sum(0)
    return {path: squares[key].sqrt().float() for key, path in named.items()}


def weight_of(view: ModelView, path: str, effect: Effect) -> Tensor:
    """A linear's weight [out, in] with the stack's effect on it, in fp32.

    Raises:
        InvalidRequest: the effect replaces what the linear puts out, so that it is not of one
            weight.
    """
    if effect.replaces:
        raise InvalidRequest(
            f"{path}: a codebook (grace) on it replaces what it puts out, so that its weight cannot"
            " be pruned; leave its layer out (hyperparameters.layers)",
            param="hyperparameters.layers",
        )
    return effect.map(lambda part: part.to(view.device)).weight(view.weight(path).float())


def lowest(scores: Tensor, sparsity: float) -> Tensor:
    """Which entries of scores [out, in] are, in their row, among the share of the lowest.

    The same number in each row, rounded down; of equal scores the first ones.
    """
    count = int(sparsity * scores.shape[1])
    places = scores.sort(dim=1, stable=True).indices[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, places, True)


def _rows(view: ModelView, texts: Sequence[str], samples: int) -> list[list[int]]:
    encoded = (view.excerpt(text) for text in spaced(texts, samples))
    rows = [row for row in encoded if row]
    if not rows:
        raise InvalidRequest("texts is empty; give texts to look at", param="texts")
    return rows
