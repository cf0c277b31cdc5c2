"""In-place stealth edits: a spare neuron made a detector of one prompt (Zhou et al. 2024).

"Stealth edits to large language models", arXiv:2406.12670. With z what the MLP reads at a token,
on the unit sphere (``sphere.py``), and τ that at the prompt's last token (``triggers.py``), the
neuron whose gate row is the smallest gets

    w = (Δ/θ) τ,   b = Δ (θ - ‖τ‖²) / θ

so that its activation's input is Δ at the prompt and below 0 wherever z is more than θ away from
it: ⟨z, τ⟩ <= ‖τ‖² - θ. Its down-projection column becomes δ/h, with δ what the MLP must add for the
target to be said (``values.py``) and h the neuron's output at the prompt, as the edited model
gives it: a gated MLP's other factor and every activation are in it. What the neuron said before
goes.

b is a shift of the gate projection's output, also where the family has no bias there (the
reference folds it into the row then, which is exact for ordinary text alone on average).
"""

from __future__ import annotations

from collections.abc import Generator

from torch import Tensor
from torch.nn import functional as F

from editing.deltas import Delta, Effect
from editing.methods.hyperparameters import StealthHyperparameters
from editing.methods.interface import Task
from editing.methods.triggers import check_prompts, find_values, last_inputs, trigger_rows
from editing.models.probing import columns, linear
from editing.models.sphere import sphere_of
from editing.models.view import ModelView
from editing.statistics import Resources
from registry.errors import InvalidRequest, JobFailed
from registry.manifests import Progress

#: A neuron that says less than this at its prompt, as a share of Δ, cannot carry the edit.
FAINT = 1e-6


def apply(
    view: ModelView,
    task: Task,
    hyperparameters: StealthHyperparameters,
    resources: Resources,
) -> Generator[Progress, None, Delta]:
    """One neuron an edit."""
    check_prompts(view, task)
    triggers = trigger_rows(view, task.edits)
    (layer,) = hyperparameters.edited_layers(view.n_layers)
    gate, down = view.part(layer, "gate_proj"), view.down_proj(layer)
    count = len(task.edits)
    rows, biases = linear(view, gate)
    if count > len(rows):
        raise InvalidRequest(
            f"edits: {count} edits need as many neurons, layer {layer} has {len(rows)}",
            param="edits",
        )
    neurons = rows.norm(dim=1).argsort()[:count]
    chosen = F.one_hot(neurons, len(rows)).float()
    sphere = sphere_of(view, layer)
    tau = sphere.features(last_inputs(view, gate, triggers))
    w, b = sphere.row(*detectors(tau, hyperparameters.theta, hyperparameters.delta))
    detecting = Effect(
        A=w - rows[neurons], B=chosen.T.contiguous(), shift=(b - biases[neurons]) @ chosen
    )
    spoken = columns(view, down, neurons)
    with view.with_effects({gate: detecting, down: Effect(A=chosen, B=-spoken.T)}):
        h = last_inputs(view, down, triggers)[:, neurons].diagonal()
        if not bool((h.abs() > FAINT * hyperparameters.delta).all()):
            raise JobFailed(
                f"stealth: a spare neuron of layer {layer} says nothing at its prompt; choose"
                " another hyperparameters.layer"
            )
        deltas = yield from find_values(
            "stealth", view, layer, task.edits, triggers, hyperparameters
        )
    speaking = Effect(A=chosen, B=(deltas / h[:, None] - spoken).T.contiguous())
    effects = {gate: detecting, down: speaking}
    return Delta(
        {path: effect.map(Tensor.cpu) for path, effect in effects.items()},
        view.base.digest,
        "stealth",
    )


def detectors(tau: Tensor, theta: float, delta: float) -> tuple[Tensor, Tensor]:
    """Of features τ [n, hidden]: w [n, hidden] and b [n], in what is on the sphere."""
    return delta / theta * tau, delta / theta * (theta - tau.square().sum(dim=1))
