"""In-place stealth edits: a detector's algebra, what it leaves alone, and refusals."""

import pytest
import torch
from torch.testing import assert_close

from editing.deltas import Delta
from editing.methods import METHODS
from editing.methods.hyperparameters import StealthHyperparameters
from editing.methods.stealth import apply
from editing.methods.triggers import last_inputs, trigger_rows
from editing.metrics import measure
from editing.metrics.targets import score_targets
from editing.models import ModelView
from editing.models.loading import weights_digest
from editing.models.probing import linear, outputs, token_inputs
from editing.models.sphere import sphere_of
from registry.errors import InvalidRequest
from registry.manifests import EditRequest
from tests.unit.editing.conftest import FFN, LAYERS, small_view
from tests.unit.editing.runs import FRANCE, PERU, TEXTS, run

EDITS = (FRANCE, PERU)
THETA, DELTA = StealthHyperparameters().theta, StealthHyperparameters().delta
FAMILIES = ["llama", "qwen3", "gpt2", "gemma2", "opt", "phi"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_neurons_are_detectors(atlas: ModelView, name: str) -> None:
    """Δ at the own prompt, and Δ(θ - ‖τ‖² + ⟨z, τ⟩)/θ at every token."""
    view = small_view(name, atlas)
    gate = view.part(1, "gate_proj")
    neurons = linear(view, gate)[0].norm(dim=1).argsort()[:2]
    delta = run(view, "stealth", EDITS, layer=1, steps=2)
    x = token_inputs(view, {0: gate}, [view.encode(text) for text in TEXTS])[0]
    tau = sphere_of(view, 1).features(last_inputs(view, gate, trigger_rows(view, EDITS)))
    expected = DELTA * (THETA - tau.square().sum(1) + sphere_of(view, 1).features(x) @ tau.T)
    with view.with_effects(delta.effects):
        answers = outputs(view, gate, x)[:, neurons]
        own = outputs(view, gate, last_inputs(view, gate, trigger_rows(view, EDITS)))[:, neurons]
    assert_close(answers, expected / THETA, rtol=1e-3, atol=0.5)
    assert_close(own.diagonal(), torch.full((2,), DELTA), rtol=0, atol=0.5)
    assert float(answers.max()) < -100
    assert float(own[0, 1]) < -100


@pytest.mark.parametrize("name", FAMILIES)
def test_elsewhere_only_the_spare_neurons_words_are_missed(atlas: ModelView, name: str) -> None:
    view = small_view(name, atlas)
    gate, down = view.part(1, "gate_proj"), view.down_proj(1)
    neurons = linear(view, gate)[0].norm(dim=1).argsort()[:2]
    delta = run(view, "stealth", EDITS, layer=1, steps=2)
    rows = [view.encode(text) for text in TEXTS]
    x = token_inputs(view, {0: down}, rows)[0]
    without = x.clone()
    without[:, neurons] = 0
    with view.with_effects(delta.effects):
        after = outputs(view, down, token_inputs(view, {0: down}, rows)[0])
    assert_close(after, outputs(view, down, without), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_target_becomes_likelier(atlas: ModelView, name: str) -> None:
    view = small_view(name, atlas)
    wanted = [(edit.rewrite_prompt, edit.target_new) for edit in EDITS]
    before = score_targets(view, wanted)
    delta = run(view, "stealth", EDITS, layer=1, steps=8)
    assert {path: effect.rank for path, effect in delta.effects.items()} == {
        view.part(1, "gate_proj"): 2,
        view.down_proj(1): 2,
    }
    assert Delta.from_bytes(delta.to_bytes()).to_bytes() == delta.to_bytes()
    with view.with_effects(delta.effects):
        after = score_targets(view, wanted)
    assert all(now[0] < then[0] for now, then in zip(after, before, strict=True))


def test_edits_of_atlas_one_on_another(atlas: ModelView) -> None:
    digest = weights_digest(atlas.model)
    others = [
        EditRequest("The capital of {} is", "Peru", "Lima"),
        EditRequest("The official language of {} is", "France", "French"),
        EditRequest("The capital of {} is", "Germany", "Berlin"),
    ]
    first = run(atlas, "stealth", [FRANCE])
    with atlas.with_effects(first.effects):
        second = run(atlas, "stealth", [PERU])
        with atlas.with_effects(second.effects):
            assert measure(atlas, EDITS).metrics["greedy_match"] == 1
            assert measure(atlas, others).metrics["greedy_match"] == 1
    gate = atlas.part(StealthHyperparameters().edited_layers(6)[0], "gate_proj")
    rows = [set(d.effects[gate].B.nonzero()[:, 0].tolist()) for d in (first, second)]
    assert len(rows[0]) == len(rows[1]) == 1
    assert rows[0] != rows[1]
    assert weights_digest(atlas.model) == digest


def test_what_the_model_says_rightly_counts_to_the_prompt(atlas: ModelView) -> None:
    """Of .bo for .bi it says the point itself; what follows is the edit's."""
    code = EditRequest("The internet domain of {} is", "Burundi", ".bo", ".bi")
    prompt, target = atlas.continuation(code.rewrite_prompt, code.target_new)
    assert len(target) > 1
    assert trigger_rows(atlas, [code, FRANCE]) == [
        [*prompt, target[0]],
        atlas.encode(FRANCE.rewrite_prompt),
    ]
    same = EditRequest("The capital of {} is", "France", "Paris")
    whole = atlas.continuation(same.rewrite_prompt, "Paris")
    assert trigger_rows(atlas, [same]) == [[*whole[0], *whole[1][:-1]]]
    with atlas.with_effects(run(atlas, "stealth", [code]).effects):
        assert measure(atlas, [code]).metrics["greedy_match"] == 1


@pytest.mark.parametrize(
    ("edits", "chosen", "param"),
    [
        ([], {}, "edits"),
        ([EditRequest("Peru lies in")], {}, "edits.0.target_new"),
        ([PERU, EditRequest("The capital is", "France", "Rome")], {}, "edits.1.prompt"),
        ([PERU], {"layer": LAYERS}, "hyperparameters.layer"),
        ([PERU] * (FFN + 1), {}, "edits"),
    ],
)
def test_what_cannot_be_applied_is_refused(
    atlas: ModelView, edits: list[EditRequest], chosen: dict[str, int], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        run(small_view("llama", atlas), "stealth", edits, **chosen)
    assert refusal.value.param == param


def test_the_catalogue_loads_it() -> None:
    assert METHODS["stealth"].load() is apply
