"""An adapter that is computed once for many passes has the gradients that it has anew in each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from editing.deltas import Effect
from editing.finetune.catalogue import TUNINGS
from editing.finetune.objectives.keeping import Keeping, ordinary
from editing.finetune.objectives.objective import Tuned, fits_linear
from editing.finetune.objectives.supervised import Supervised
from editing.models import ModelView
from tests.unit.editing.conftest import small_view
from tests.unit.editing.test_objectives import EXAMPLES

TEXTS = ["The capital of Peru is Lima.", "Zinc is a transition metal."]
#: Factors, a scale, a shift, dense, dense with a shift, sparse, gated, offsets, rotations.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "ia3": {},
    "beft": {},
    "full": {},
    "oft": {},
    "hra": {"r": 4},
    "glora": {"r": 4},
    "shira": {"r": 4},
    "spiel": {},
    "compacter": {"bottleneck": 8},
    "ssf": {},
}


def gradients(
    view: ModelView, name: str, held: bool, below: dict[str, Effect]
) -> dict[str, Tensor]:
    """Of every parameter, from several flat rows and the texts to keep."""
    entry = TUNINGS[name]
    adapter = entry.build(view, entry.hyperparameters(**METHODS[name]), 1)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=source)
    aim = Keeping(Supervised(), ordinary(view, TEXTS), weight=2.0, count=3)
    rows = aim.rows(view, EXAMPLES)
    adapter.before_step(0, 1)
    tuned = Tuned(view, adapter, 12)
    with view.with_effects(below):
        if held:
            with tuned.holding() as within:
                aim.backward(within, rows, 1)
        else:
            aim.backward(tuned, rows, 1)
    return {n: p.grad for n, p in adapter.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_the_same(atlas: ModelView, family: str, name: str) -> None:
    view = small_view(family, atlas)
    anew, once = (gradients(view, name, held, {}) for held in (False, True))
    assert anew.keys() == once.keys()
    assert anew
    for parameter, gradient in anew.items():
        assert_close(once[parameter], gradient, rtol=1e-3, atol=1e-6)


def test_what_is_below_stays_below(atlas: ModelView) -> None:
    """A version that scales what a linear puts out does not scale what is trained beside it."""
    view = small_view("llama", atlas)
    path = next(iter(TUNINGS["full"].build(view, TUNINGS["full"].hyperparameters(), 1).effects()))
    out, width = view.weight(path).shape
    dense = Effect(dense=torch.zeros(out, width))
    below = {path: Effect(scale=torch.full((out,), 3.0))}
    assert fits_linear(view, path, dense)
    with view.with_effects(below):
        assert not fits_linear(view, path, dense)
    anew, once = (gradients(view, "full", held, below) for held in (False, True))
    for parameter, gradient in anew.items():
        assert_close(once[parameter], gradient, rtol=1e-3, atol=1e-6)


def test_linears_are_themselves_again(atlas: ModelView) -> None:
    view = small_view("llama", atlas)
    before = {name: dict(module.__dict__) for name, module in view.model.named_modules()}
    gradients(view, "full", True, {})
    for name, module in view.model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
