"""The norm of an update without the update, against the update itself."""

import math

import pytest
import torch

from editing.deltas import Effect, Gate, Sparse
from editing.metrics.norm import update_norm, update_ratio
from editing.models import ModelView
from tests.unit.editing.conftest import FFN, HIDDEN, VOCABULARY, small_view

SOURCE = torch.Generator().manual_seed(3)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=SOURCE)


W = random(7, 5)
D = random(7, 5) * (random(7, 5) > 0.3)
PARTS = {
    "low-rank": Effect(A=random(3, 5), B=random(7, 3)),
    "dense": Effect(dense=D),
    "sparse": Effect(sparse=Sparse.of(D)),
    "scale": Effect(scale=random(7), shift=random(7)),
    "all": Effect(random(7), random(7), random(2, 5), random(7, 2), D),
    "all-sparse": Effect(random(7), None, random(2, 5), random(7, 2), sparse=Sparse.of(D)),
}


@pytest.mark.parametrize("name", PARTS)
def test_against_the_dense_update(name: str) -> None:
    effect = PARTS[name]
    eye = torch.eye(5)
    after = effect.apply(eye, eye @ W.T).T
    bias = effect.apply(torch.zeros(1, 5), torch.zeros(1, 7)).T
    expected = float((after - bias - W).double().norm())
    assert update_norm(W, effect) == pytest.approx(expected, rel=1e-5)


def test_what_changes_no_weight_has_none(atlas: ModelView) -> None:
    gate = Effect(gates=(Gate(random(1, 256), random(1), random(1, 256)),))
    assert update_norm(W, Effect(shift=random(7))) is None
    assert update_ratio(atlas, {"model.layers.0.mlp": gate}) is None
    assert update_ratio(atlas, {}) is None


def test_numbers_that_are_none_are_told(atlas: ModelView) -> None:
    effect = Effect(A=torch.full((1, 768), math.nan), B=torch.ones(256, 1))
    ratio = update_ratio(atlas, {atlas.down_proj(0): effect})
    assert ratio is not None
    assert math.isnan(ratio)


def test_a_weight_of_zeros_is_changed_without_bounds(atlas: ModelView) -> None:
    view = small_view("llama", atlas)
    path = view.down_proj(0)
    view.weight(path).zero_()
    added = Effect(A=random(1, FFN), B=random(HIDDEN, 1))
    assert update_ratio(view, {path: added}) == math.inf
    assert update_ratio(view, {path: Effect(scale=random(HIDDEN))}) == 0
    nothing = Effect(A=torch.full((1, FFN), math.nan), B=random(HIDDEN, 1))
    assert math.isnan(update_ratio(view, {path: nothing}) or 0)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_the_largest_ratio_of_a_model(atlas: ModelView, name: str) -> None:
    view = small_view(name, atlas)
    head = {"gpt2": "transformer.wte"}.get(name, "model.embed_tokens")
    norm = view.part(0, "mlp_norm")
    effects = {
        view.down_proj(0): Effect(A=random(1, FFN), B=random(HIDDEN, 1)),
        view.down_proj(1): Effect(dense=random(HIDDEN, FFN)),
        head: Effect(A=random(1, VOCABULARY), B=random(HIDDEN, 1)),
        norm: Effect(scale=random(HIDDEN)),
    }
    ratios = {}
    for path, effect in effects.items():
        weight = view.weight(path)
        if path == norm:
            change = (effect.scale - 1) * weight
        else:
            change = effect.dense if effect.B is None else effect.B @ effect.A
        ratios[path] = float(change.norm() / weight.norm())
    assert update_ratio(view, effects) == pytest.approx(max(ratios.values()), rel=1e-4)
    for path, ratio in ratios.items():
        assert update_ratio(view, {path: effects[path]}) == pytest.approx(ratio, rel=1e-4)
