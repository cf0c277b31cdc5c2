"""ROCR: the state a concept is given, what its change leaves alone, and what atlas then says."""

from itertools import islice

import pytest
import torch
from torch.testing import assert_close

from benchmarks.editing.behaviour import answers
from editing.atlas.corpus import Corpus
from editing.atlas.facts import read_facts
from editing.deltas import Delta
from editing.methods import METHODS
from editing.methods.alphaedit import null_space
from editing.methods.hyperparameters import RocrHyperparameters
from editing.methods.interface import Task
from editing.methods.locate import Place, after, last_token_means
from editing.methods.rocr import apply, forms_of
from editing.models import ModelView
from editing.models.loading import weights_digest
from editing.statistics import Resources, prepare
from registry.errors import InvalidRequest, JobFailed, UnsupportedModel
from registry.manifests import EditRequest
from tests.unit.editing.conftest import small_view
from tests.unit.editing.test_rome import finish

PERU = EditRequest("The capital of {} is", "Peru", redirect_to="Japan")
MALI = EditRequest("{} lies in", "Mali", redirect_to="North Macedonia")


def place(forms: list[str], concept: str) -> Place:
    return Place([form.replace("{}", concept) for form in forms], concept)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_the_redirected_state(name: str, atlas: ModelView) -> None:
    """At the mean key the MLP says what turns the concept's state into the other's, and nothing
    along directions that ordinary text uses."""
    view = small_view(name, atlas)
    view.model.double()
    before = weights_digest(view.model)
    layer, path = 1, view.down_proj(1)
    resources = finish(prepare(view, [layer], 300))[1]
    chosen = RocrHyperparameters(layers=(layer,), null_threshold=0.9, ridge=1e-9)
    _, delta = finish(apply(view, Task([PERU]), chosen, resources))
    assert weights_digest(view.model) == before
    (effect,) = delta.effects.values()
    assert effect.rank == 1
    forms = forms_of(view, PERU, resources.prefixes)
    own, other = place(forms, "Peru"), place(forms, "Japan")
    out = {0: after(view, layer)}
    missing = (last_token_means(view, out, [other])[0] - last_token_means(view, out, [own])[0])[0]
    key = last_token_means(view, {0: path}, [own])[0][0]
    dW = effect.B.double() @ effect.A.double()
    assert_close(dW @ key.double(), missing.double(), rtol=1e-3, atol=1e-3)
    P = null_space(resources.covariance[layer], 0.9)
    assert 0 < round(float(P.trace())) < len(P)
    assert (dW @ (torch.eye(len(P)) - P)).abs().max() < 1e-5 * dW.abs().max()
    with view.with_effects(delta.effects):
        reached = last_token_means(view, out, [own])[0][0]
    assert_close(reached, last_token_means(view, out, [other])[0][0], rtol=1e-3, atol=1e-3)


def test_two_concepts_and_a_stack(atlas: ModelView) -> None:
    """What an earlier delta wrote stays: at its keys a later one says nothing."""
    view = small_view("llama", atlas)
    resources = finish(prepare(view, [1], 300))[1]
    chosen = RocrHyperparameters(layers=(1,), null_threshold=1e9, ridge=1e-7)
    _, both = finish(apply(view, Task([PERU, MALI]), chosen, resources))
    assert both.effects[view.down_proj(1)].rank == both.state["keys/1"].shape[1] == 2
    _, first = finish(apply(view, Task([PERU]), chosen, resources))
    with view.with_effects(first.effects):
        _, second = finish(apply(view, Task([MALI], stack=[first]), chosen, resources))
        _, blind = finish(apply(view, Task([MALI]), chosen, resources))
    key = first.state["keys/1"][:, 0]

    def said(delta: Delta) -> float:
        effect = delta.effects[view.down_proj(1)]
        return float((effect.B @ (effect.A @ key)).norm() / effect.B.norm())

    assert said(second) < 0.01
    assert said(second) < 0.2 * said(blind)


def test_forms_hold_the_concept_alone(atlas: ModelView) -> None:
    forms = forms_of(atlas, PERU, ["Oslo is far. ", "Japan is far. ", "Peru is far. "])
    assert forms[:3] == ["{}", "The capital of {} is", "Oslo is far. {}"]
    assert len(forms) == 7
    assert all(form.count("{}") == 1 for form in forms)
    start = atlas.tokenizer.bos_token_id
    for form in forms:
        assert atlas.encode(form.replace("{}", "Peru")).count(start) == 1
    plain = small_view("gpt2", atlas)
    assert forms_of(plain, PERU, []) == ["{}", "The capital of {} is"]


def test_a_country_of_atlas_becomes_another(atlas: ModelView) -> None:
    layers = RocrHyperparameters().edited_layers(atlas.n_layers)
    texts = [document.text for document in islice(Corpus(read_facts()), 400)]
    resources = finish(prepare(atlas, layers, 8000, texts))[1]
    progress, delta = finish(apply(atlas, Task([PERU]), RocrHyperparameters(), resources))
    assert progress[-1].total >= progress[-1].done
    asked = ["The capital of {} is", "{} is governed from", "As for {}, its continent is"]
    asked += ["Phone numbers in {} begin with", "Schools in {} teach in"]
    rows = {
        name: [atlas.open(text.replace("{}", name)) for text in asked]
        for name in ("Peru", "Japan", "Mali")
    }
    other, aside = answers(atlas, rows["Japan"]), answers(atlas, rows["Mali"])
    assert answers(atlas, rows["Peru"]) != other
    with atlas.with_effects(delta.effects):
        assert answers(atlas, rows["Peru"]) == other
        assert answers(atlas, rows["Mali"]) == aside


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (EditRequest("The capital of {} is", "Peru"), "edits.0.redirect_to"),
        (EditRequest("The capital of {} is", "Peru", redirect_to=" "), "edits.0.redirect_to"),
        (EditRequest("The capital of {} is", "Peru", redirect_to="Peru"), "edits.0.redirect_to"),
        (EditRequest("The capital of Peru is", redirect_to="Japan"), "edits.0.subject"),
        (EditRequest("The capital of Peru is", "Peru", redirect_to="Japan"), "edits.0.prompt"),
    ],
)
def test_what_cannot_be_applied_is_refused(
    atlas: ModelView, request_: EditRequest, param: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        finish(apply(atlas, Task([request_]), RocrHyperparameters(), Resources({}, 0, (), (), ())))
    assert refusal.value.param == param


def test_no_covariance_and_a_norm_after_the_mlp(atlas: ModelView) -> None:
    nothing = Resources({}, 0, (), (), ())
    with pytest.raises(JobFailed, match="layer 0"):
        finish(apply(atlas, Task([PERU]), RocrHyperparameters(), nothing))
    with pytest.raises(UnsupportedModel, match="passes a norm"):
        finish(apply(small_view("gemma2", atlas), Task([PERU]), RocrHyperparameters(), nothing))


def test_the_catalogue_loads_it() -> None:
    assert METHODS["rocr"].load() is apply
