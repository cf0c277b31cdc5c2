"""Jet-pack stealth edits: a block of detectors beside the MLP (Zhou et al. 2024).

"Stealth edits to large language models", arXiv:2406.12670. The MLP of one layer becomes

    y = MLP(x) + W2 relu(W1 ρ(x) + b),   ρ(x) = (z - c) / ‖z - c‖

with z what the MLP reads, on the unit sphere (``sphere.py``), and c the mean of z over ordinary
text. Of an edit whose prompt's last token has ρ(x) = τ, the row of W1 is (Δ/θ) τ, its bias
Δ (θ - ‖τ‖²) / θ and its column of W2 is δ/Δ: where ⟨ρ(x), τ⟩ <= 1 - θ nothing is added at all. δ is
what the MLP must add for the target to be said (``values.py``).

A row, a bias and a column are all there is of an edit: ``without`` takes it out alone.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from editing.deltas import Delta, Effect, Gate
from editing.methods.hyperparameters import StealthHyperparameters
from editing.methods.interface import Task
from editing.methods.stealth import detectors
from editing.methods.triggers import check_prompts, find_values, last_inputs, trigger_rows
from editing.models.sphere import sphere_of, token_features
from editing.models.view import ModelView
from editing.statistics import Resources
from registry.errors import JobFailed
from registry.manifests import Progress

#: Ordinary texts whose features are averaged.
TEXTS = 256


def apply(
    view: ModelView,
    task: Task,
    hyperparameters: StealthHyperparameters,
    resources: Resources,
) -> Generator[Progress, None, Delta]:
    """One row and one column an edit, in the order of the edits."""
    check_prompts(view, task)
    triggers = trigger_rows(view, task.edits)
    (layer,) = hyperparameters.edited_layers(view.n_layers)
    path = view.part(layer, "mlp")
    if not resources.texts:
        raise JobFailed("jetpack: the resources hold no texts whose mean could be taken")
    sphere = sphere_of(view, layer)
    ordinary = token_features(view, [layer], resources.texts[:TEXTS])[layer]
    offset = sphere.offset - ordinary.mean(dim=0)
    x = last_inputs(view, path, triggers)
    tau = F.normalize(x * sphere.weight + offset, dim=1)
    keys, bias = detectors(tau, hyperparameters.theta, hyperparameters.delta)
    deltas = yield from find_values("jetpack", view, layer, task.edits, triggers, hyperparameters)
    gate = Gate(
        keys, bias, deltas / hyperparameters.delta, sphere.weight, offset, "relu", normalise=True
    )
    effect = Effect(gates=(gate.map(Tensor.cpu),))
    return Delta({path: effect}, view.base.digest, "jetpack")


def without(delta: Delta, edit: int) -> Delta:
    """The delta less one of its edits, the others as they are.

    Raises:
        IndexError: the delta has no such edit.
    """
    effects = {}
    for path, effect in delta.effects.items():
        gates = tuple(_dropped(effect.gates, edit))
        if gates:
            effects[path] = replace(effect, gates=gates)
    return replace(delta, effects=effects)


def _dropped(gates: Sequence[Gate], edit: int) -> Generator[Gate, None, None]:
    for gate in gates:
        count = len(gate.keys)
        if not 0 <= edit < count:
            raise IndexError(f"edit {edit}: the jet-pack has {count}")
        rest = torch.arange(count) != edit
        if count > 1:
            yield replace(
                gate, keys=gate.keys[rest], bias=gate.bias[rest], values=gate.values[rest]
            )
