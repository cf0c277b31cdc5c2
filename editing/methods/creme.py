"""CREME: attention is led to answer as it does a guide prompt, without a gradient.

With k the input of a layer's attention output projection W at the last token of the edit's prompt,
o = W k, and o_guide the projection's output at the last token of ``guide_prompt``:

    ΔW = (o_guide − o) uᵀ / ‖k‖,   u = k / ‖k‖,   so that (W + ΔW) k = o_guide

of rank 1 in each of several layers. Many edits are solved jointly, in fp64: with their keys
K [in, n] and what is missing R = O_guide − W K [out, n],

    ΔW = R K⁺,   so that (W + ΔW) K = O_guide where the keys are linearly independent

which one edit after another would not give: each would move the outputs of those before it. Where
keys coincide the targets' mean is met. o_guide is taken from the model before any change; k and o
of a layer with the edit's changes below in place, so that the edited model meets every target.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence

import torch
from torch import Tensor

from editing.deltas import Delta, Effect
from editing.methods.hyperparameters import CremeHyperparameters
from editing.methods.interface import Task, check_task
from editing.metrics.targets import batches
from editing.models.view import ModelView
from editing.statistics import Resources
from registry.manifests import Progress

METHOD = "creme"


def apply(
    view: ModelView, task: Task, hyperparameters: CremeHyperparameters, resources: Resources
) -> Generator[Progress, None, Delta]:
    """Make all edits at once, layer by layer upwards."""
    check_task(task, "guide_prompt")
    layers = hyperparameters.edited_layers(view.n_layers)
    paths = {layer: view.part(layer, "o_proj") for layer in layers}
    guides = [edit.guide_prompt or "" for edit in task.edits]
    targets = {
        layer: outputs(view, paths[layer], K) for layer, K in last_keys(view, paths, guides).items()
    }
    prompts = [edit.rewrite_prompt for edit in task.edits]
    effects: dict[str, Effect] = {}
    for done, (layer, path) in enumerate(paths.items()):
        yield Progress(done, len(paths), f"solving for layer {layer}")
        with view.with_effects(effects):
            K = last_keys(view, {layer: path}, prompts)[layer]
            R = targets[layer] - outputs(view, path, K)
        solved: Tensor = torch.linalg.pinv(K.double())
        effects[path] = Effect(A=solved.float().contiguous().cpu(), B=R.contiguous().cpu())
    yield Progress(len(paths), len(paths), f"solved {len(paths)} layers")
    return Delta(effects, view.base.digest, METHOD)


@torch.no_grad()
def last_keys(
    view: ModelView, paths: Mapping[int, str], prompts: Sequence[str]
) -> dict[int, Tensor]:
    """Inputs of modules at each prompt's last token: [in, n] in fp32 by key of ``paths``."""
    rows = [view.open(prompt) for prompt in prompts]
    found: dict[int, Tensor] = {}
    for batch in batches([len(row) for row in rows]):
        ends = torch.tensor([len(rows[i]) - 1 for i in batch])
        for key, inputs in view.inputs(paths, [rows[i] for i in batch]).items():
            taken = inputs[torch.arange(len(batch)), ends].T
            if key not in found:
                found[key] = taken.new_empty(len(taken), len(rows))
            found[key][:, batch] = taken
    return found


@torch.no_grad()
def outputs(view: ModelView, path: str, K: Tensor) -> Tensor:
    """What a linear, with the effects active on it, gives for inputs K [in, n]: [out, n]."""
    out: Tensor = view.module(path)(K.T.to(view.model.dtype))
    return out.float().T
