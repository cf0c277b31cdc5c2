"""Jet-pack edits: nothing off the trigger, the target on it, each edit removable alone."""

import pytest
import torch
from torch.testing import assert_close

from editing.deltas import Delta, compose
from editing.methods import METHODS
from editing.methods.hyperparameters import StealthHyperparameters
from editing.methods.interface import Task
from editing.methods.jetpack import apply, without
from editing.methods.triggers import last_inputs, trigger_rows
from editing.metrics import measure
from editing.metrics.targets import score_targets
from editing.models import ModelView
from editing.statistics import Resources
from registry.errors import InvalidRequest, JobFailed, UnsupportedModel
from registry.manifests import EditRequest
from tests.unit.editing.conftest import small_view
from tests.unit.editing.runs import FRANCE, PERU, TEXTS, logits, prompts, run

EDITS = (FRANCE, PERU)
FAMILIES = ["llama", "qwen3", "gpt2", "gemma2"]


@pytest.mark.parametrize("name", FAMILIES)
def test_off_its_triggers_nothing_changes(atlas: ModelView, name: str) -> None:
    view = small_view(name, atlas)
    delta = run(view, "jetpack", EDITS, layer=1, steps=8)
    before = logits(view, *TEXTS, *prompts(EDITS))
    with view.with_effects(delta.effects):
        after = logits(view, *TEXTS, *prompts(EDITS))
    for then, now in zip(before[: len(TEXTS)], after, strict=False):
        assert torch.equal(then, now)
    for then, now in zip(before[len(TEXTS) :], after[len(TEXTS) :], strict=True):
        assert torch.equal(then[:, :-1], now[:, :-1])
        assert not torch.equal(then[:, -1], now[:, -1])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_key_answers_delta_to_its_prompt(atlas: ModelView, name: str) -> None:
    view = small_view(name, atlas)
    delta = run(view, "jetpack", EDITS, layer=1, steps=8)
    path = view.part(1, "mlp")
    (gate,) = delta.effects[path].gates
    answers = gate.rho(last_inputs(view, path, trigger_rows(view, EDITS))) @ gate.keys.T + gate.bias
    expected = torch.full((2,), StealthHyperparameters().delta)
    assert_close(answers.diagonal(), expected, rtol=1e-2, atol=0)
    assert float(answers[0, 1]) < 0
    assert Delta.from_bytes(delta.to_bytes()).to_bytes() == delta.to_bytes()
    wanted = [(edit.rewrite_prompt, edit.target_new) for edit in EDITS]
    before = score_targets(view, wanted)
    with view.with_effects(delta.effects):
        after = score_targets(view, wanted)
    assert all(now[0] < then[0] for now, then in zip(after, before, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_an_edit_taken_out_restores_the_bits(atlas: ModelView, name: str) -> None:
    view = small_view(name, atlas)
    delta = run(view, "jetpack", EDITS, layer=1, steps=4)
    before = logits(view, *prompts(EDITS))
    with view.with_effects(delta.effects):
        both = logits(view, *prompts(EDITS))
    for taken, left in ((0, 1), (1, 0)):
        rest = without(delta, taken)
        ((gate,), (all_,)) = (d.effects[view.part(1, "mlp")].gates for d in (rest, delta))
        for name, tensor in gate.tensors().items():
            whole = all_.tensors()[name]
            kept = whole[[left]] if name in ("keys", "bias", "values") else whole
            assert torch.equal(tensor, kept)
        with view.with_effects(rest.effects):
            after = logits(view, *prompts(EDITS))
        assert torch.equal(after[taken], before[taken])
        assert_close(after[left], both[left], rtol=1e-4, atol=1e-4)
    assert without(without(delta, 0), 0).effects == {}
    with pytest.raises(IndexError):
        without(delta, 2)


def test_edits_of_atlas_one_on_another(atlas: ModelView) -> None:
    first = run(atlas, "jetpack", [FRANCE])
    with atlas.with_effects(first.effects):
        second = run(atlas, "jetpack", [PERU])
    composed = compose([first.effects, second.effects])
    with atlas.with_effects(composed):
        assert measure(atlas, EDITS).metrics["greedy_match"] == 1
    (gate,) = next(iter(composed.values())).gates
    assert len(gate.keys) == 2


def test_refusals(atlas: ModelView) -> None:
    view = small_view("llama", atlas)
    with pytest.raises(InvalidRequest) as refusal:
        run(view, "jetpack", [EditRequest("Peru lies in")])
    assert refusal.value.param == "edits.0.target_new"
    with pytest.raises(UnsupportedModel, match="mlp"):
        run(small_view("opt", atlas), "jetpack", EDITS)
    with pytest.raises(JobFailed, match="texts"):
        list(apply(view, Task(EDITS), StealthHyperparameters(), Resources({}, 0, (), (), ())))


def test_the_catalogue_loads_it() -> None:
    assert METHODS["jetpack"].load() is apply
