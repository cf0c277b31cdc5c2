"""Deactivate MLP neurons that go with an unwanted behaviour, whatever the setting.

After the work on language mismatch and repetition in translation by large models, where neurons
are located under several language settings, intersected, and deactivated. Only its abstract was
followed; what it leaves open is chosen here:

* a text's activation of neuron j is the mean of \\|k_j\\| over its tokens, k the input of the MLP's
  down-projection; of a gated MLP the sign of k_j says nothing, since the up-projection has both;
* its weight in a setting is (mean over texts with the behaviour − mean over those without it)
  times ‖W_j‖, what the neuron writes into the residual stream for each unit of k_j, so that
  neurons of all layers can be compared;
* each setting gives the ``share`` of the neurons of all layers with the largest positive weight,
  and a neuron that every setting gives is deactivated.

A deactivated neuron is one whose activation function is given 0, and gives 0: a scale of 0 on its
row of the gate (of an MLP without a gate: the up-projection). That is the same as taking its column
out of W with whatever the stack beneath has added to it, and smaller in bytes than either a sparse
or a low-rank change of W from three neurons a layer on.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence

import torch
from torch import Tensor

from editing.deltas import Delta, Effect
from editing.methods.hyperparameters import NeuronHyperparameters
from editing.methods.interface import Task, check_task
from editing.models.view import ModelView
from editing.statistics import Resources
from registry.errors import InvalidRequest, JobFailed, UnsupportedModel
from registry.manifests import Example, Progress

METHOD = "neurons"


def apply(
    view: ModelView, task: Task, hyperparameters: NeuronHyperparameters, resources: Resources
) -> Generator[Progress, None, Delta]:
    """Deactivate the neurons that all settings have in common.

    Raises:
        InvalidRequest: an empty text, or a setting without texts of both labels.
        JobFailed: the settings have no neuron in common.
    """
    check_task(task, "examples")
    check_settings(task.examples)
    paths = {layer: view.down_proj(layer) for layer in hyperparameters.edited_layers(view.n_layers)}
    activations = []
    for done, example in enumerate(task.examples):
        yield Progress(done, len(task.examples), "looking at the neurons' activations")
        activations.append(mean_activations(view, paths, example.text))
    written = torch.stack([view.weight(path).float().norm(dim=0) for path in paths.values()])
    found = {
        setting: top_neurons(weight * written, hyperparameters.share)
        for setting, weight in differences(task.examples, torch.stack(activations)).items()
    }
    common = torch.stack(list(found.values())).all(dim=0)
    if not bool(common.any()):
        told = ", ".join(f"{setting!r} {int(chosen.sum())}" for setting, chosen in found.items())
        raise JobFailed(
            f"neurons: no neuron goes with the behaviour in every setting (found: {told});"
            " raise hyperparameters.share or give more examples"
        )
    effects = {
        view.part(layer, "gate_proj"): Effect(scale=(~chosen).float().cpu())
        for layer, chosen in zip(paths, common, strict=True)
        if bool(chosen.any())
    }
    check_silent(view, paths, effects, task.examples[0].text)
    count = int(common.sum())
    yield Progress(
        len(task.examples),
        len(task.examples),
        f"{count} neurons of {len(effects)} layers deactivated",
        {"neurons": float(count)},
    )
    return Delta(effects, view.base.digest, METHOD)


def check_settings(examples: Sequence[Example]) -> None:
    """Every text says something, and every setting holds texts with and without the behaviour."""
    for i, example in enumerate(examples):
        if not example.text.strip():
            raise InvalidRequest(f"examples.{i}.text is empty", param=f"examples.{i}.text")
        same = {other.label for other in examples if other.setting == example.setting}
        if len(same) < 2:
            raise InvalidRequest(
                f"examples.{i}.setting: {example.setting!r} needs texts with the behaviour"
                f" (label true) and without (false); it has label {str(example.label).lower()}"
                " alone",
                param=f"examples.{i}.setting",
            )


def mean_activations(view: ModelView, paths: Mapping[int, str], text: str) -> Tensor:
    """Mean \\|k\\| over a text's tokens, as far as the context reads it: [layers, neurons]."""
    keys = view.inputs(paths, [view.excerpt(text)])
    return torch.stack([keys[layer][0].abs().mean(dim=0) for layer in paths])


def differences(examples: Sequence[Example], activations: Tensor) -> dict[str, Tensor]:
    """By setting, mean activation with the behaviour less that without it [layers, neurons].

    ``activations`` [examples, layers, neurons] are those of the examples' texts.
    """
    found = {}
    for setting in dict.fromkeys(example.setting for example in examples):
        means = [
            activations[[e.setting == setting and e.label == label for e in examples]].mean(dim=0)
            for label in (True, False)
        ]
        found[setting] = means[0] - means[1]
    return found


def top_neurons(weights: Tensor, share: float) -> Tensor:
    """Which of all neurons [layers, neurons] are among the ``share`` of the largest weights above
    zero; at least one is looked at."""
    count = max(1, round(share * weights.numel()))
    chosen = torch.zeros(weights.numel(), dtype=torch.bool, device=weights.device)
    chosen[weights.flatten().topk(count).indices] = True
    return chosen.view_as(weights) & (weights > 0)


def check_silent(
    view: ModelView, paths: Mapping[int, str], effects: Mapping[str, Effect], text: str
) -> None:
    """Raises UnsupportedModel where the activation function does not give 0 for 0."""
    with view.with_effects(effects):
        keys = view.inputs(paths, [view.excerpt(text)])
    for layer in paths:
        effect = effects.get(view.part(layer, "gate_proj"))
        if effect is None or effect.scale is None:
            continue
        if bool(keys[layer][..., (effect.scale == 0).to(view.device)].any()):
            raise UnsupportedModel(
                f"base {view.base.name!r}: the MLP's activation function is not 0 at 0, so that"
                " its neurons cannot be deactivated"
            )
