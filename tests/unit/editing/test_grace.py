"""GRACE: balls that grow and split, and an output replaced within them alone."""

import pytest
import torch
from torch.testing import assert_close

from editing.deltas import Delta
from editing.methods import METHODS
from editing.methods.grace import apply, codebook
from editing.methods.hyperparameters import GraceHyperparameters
from editing.methods.triggers import last_inputs, trigger_rows
from editing.metrics import measure
from editing.metrics.targets import score_targets
from editing.models import ModelView
from editing.models.probing import outputs
from registry.errors import InvalidRequest
from registry.manifests import EditRequest
from tests.unit.editing.conftest import small_view
from tests.unit.editing.runs import FRANCE, PERU, TEXTS, logits, run

EDITS = (FRANCE, PERU)
FAMILIES = ["llama", "qwen3", "gpt2", "gemma2", "opt"]


def test_balls_grow_where_targets_agree_and_split_where_they_do_not() -> None:
    keys = torch.tensor([[0.0, 0.0], [1.5, 0.0], [-1.0, 0.0], [9.0, 0.0], [9.5, 0.0]])
    targets = ["Rome", "Rome", "Oslo", "Oslo", "Rome"]
    book = codebook(keys, targets, torch.ones(5))
    assert book == {0: 0.5, 2: 0.5, 3: 0.25, 4: 0.25}
    assert codebook(keys[:2], targets[:2], torch.ones(2)) == {0: 1.5}
    assert codebook(keys[:2], ["Rome", "Oslo"], torch.full((2,), 0.5)) == {0: 0.5, 1: 0.5}


@pytest.mark.parametrize("name", FAMILIES)
def test_within_a_ball_the_output_is_the_value(atlas: ModelView, name: str) -> None:
    view = small_view(name, atlas)
    delta = run(view, "grace", EDITS, layer=1, steps=4, radius=0.05)
    path = view.down_proj(1)
    (gate,) = delta.effects[path].gates
    away = torch.randn(gate.keys.shape, generator=torch.Generator().manual_seed(0))
    away = away / away.norm(dim=1, keepdim=True) * gate.bias[:, None]
    rows = torch.cat([gate.keys, gate.keys + 0.99 * away, gate.keys + 1.01 * away])
    plain = outputs(view, path, rows)
    with view.with_effects(delta.effects):
        replaced = outputs(view, path, rows)
    assert torch.equal(replaced[:4], gate.values.repeat(2, 1))
    assert torch.equal(replaced[4:], plain[4:])
    assert_close(
        gate.keys, last_inputs(view, path, trigger_rows(view, EDITS)), rtol=1e-4, atol=1e-4
    )
    assert_close(gate.bias, 0.05 * gate.keys.norm(dim=1))
    assert Delta.from_bytes(delta.to_bytes()).to_bytes() == delta.to_bytes()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_target_becomes_likelier_and_other_texts_keep_their_bits(
    atlas: ModelView, name: str
) -> None:
    view = small_view(name, atlas)
    wanted = [(edit.rewrite_prompt, edit.target_new) for edit in EDITS]
    before, texts = score_targets(view, wanted), logits(view, *TEXTS)
    delta = run(view, "grace", EDITS, layer=1, steps=8, radius=0.01)
    with view.with_effects(delta.effects):
        after, now = score_targets(view, wanted), logits(view, *TEXTS)
    assert all(a[0] < b[0] for a, b in zip(after, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(now, texts, strict=True))


def test_edits_of_atlas_one_on_another(atlas: ModelView) -> None:
    first = run(atlas, "grace", [FRANCE])
    with atlas.with_effects(first.effects):
        second = run(atlas, "grace", [PERU])
        with atlas.with_effects(second.effects):
            assert measure(atlas, EDITS).metrics["greedy_match"] == 1
    layer = GraceHyperparameters().edited_layers(atlas.n_layers)[0]
    assert first.effects[atlas.down_proj(layer)].replaces


def test_one_entry_serves_two_wordings(atlas: ModelView) -> None:
    other = EditRequest("The name of the capital of France is", target_new="Rome")
    delta = run(atlas, "grace", [FRANCE, other])
    (effect,) = delta.effects.values()
    assert len(effect.gates[0].keys) == 1
    with atlas.with_effects(delta.effects):
        assert measure(atlas, [FRANCE, other]).metrics["greedy_match"] == 1


def test_refusals(atlas: ModelView) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        run(small_view("llama", atlas), "grace", [EditRequest(" ", target_new="Rome"), PERU])
    assert refusal.value.param == "edits.0.prompt"
    with pytest.raises(InvalidRequest) as refusal:
        run(small_view("llama", atlas), "grace", [PERU], layer=7)
    assert refusal.value.param == "hyperparameters.layer"


def test_the_catalogue_loads_it() -> None:
    assert METHODS["grace"].load() is apply
