"""What is served of peft's adapters is what its layers compute, and each of its kinds is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.utils.peft_types import PeftType
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from editing.finetune.catalogue import REFUSED, TUNINGS
from editing.finetune.library import LibraryAdapter
from editing.models import ModelView
from registry.errors import InvalidRequest
from tests.unit.editing.conftest import small_view

#: Of each kind what suits linears of 32 inputs.
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "ia3": {},
    "beft": {},
    "loha": {"r": 4},
    "lokr": {"r": 4},
    "hira": {"r": 4},
    "vera": {"r": 16},
    "randlora": {"r": 4},
    "shira": {"r": 4},
    "delora": {"r": 4},
    "gralora": {"r": 4},
    "peanut": {"r": 4},
    "glora": {"r": 4},
    "deft": {"r": 4},
    "miss": {"r": 4},
    "c3a": {},
    "fourierft": {"n_frequency": 100},
    "waveft": {"n_frequency": 100},
    "tinylora": {},
    "osf": {},
    "oft": {},
    "boft": {},
    "hra": {"r": 4},
    "psoft": {"r": 8},
    "road": {},
    "supertuning": {"sparsity": 0.9},
}


def test_every_kind_of_peft_is_offered_or_refused() -> None:
    kinds = {kind.value.lower() for kind in PeftType}
    assert kinds <= {*TUNINGS, *REFUSED}
    assert not {*TUNINGS} & {*REFUSED}
    assert {*KINDS} == kinds & {*TUNINGS} - {"ln_tuning"}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", KINDS)
def test_an_effect_is_what_the_layer_computes(atlas: ModelView, name: str) -> None:
    view, entry = small_view("llama", atlas), TUNINGS[name]
    chosen = entry.hyperparameters(**KINDS[name], target_modules=["q_proj", "down_proj"])
    adapter = entry.build(view, chosen, 1)
    assert isinstance(adapter, LibraryAdapter)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=source)
        for path, effect in adapter.effects().items():
            weight = view.weight(path)
            x = torch.randn(5, weight.shape[1], generator=source)
            wanted = adapter.layers[path.replace(".", "/")](x)
            assert not torch.allclose(wanted, x @ weight.T, atol=1e-3)
            assert_close(effect.apply(x, F.linear(x, weight)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "dora", "oft", "miss", "glora", "road"])
def test_a_base_in_bf16_has_the_effects_of_one_in_fp32(atlas: ModelView, name: str) -> None:
    """At the start, and of a change that is smaller than what tells two bf16 weights apart."""
    changes: list[list[Tensor]] = []
    for dtype in (torch.float32, torch.bfloat16):
        view, entry = small_view("llama", atlas), TUNINGS[name]
        view.model.to(torch.bfloat16).to(dtype)
        chosen = entry.hyperparameters(**KINDS.get(name, {}), target_modules=["q_proj"])
        adapter = entry.build(view, chosen, 1)
        source, found = torch.Generator().manual_seed(0), []
        with torch.no_grad():
            for size in (0, 1e-4):
                for parameter in adapter.parameters():
                    if parameter.requires_grad:
                        parameter += size * torch.randn(parameter.shape, generator=source)
                for path, effect in adapter.effects().items():
                    change = effect.change(view.weight(path))
                    assert change is not None
                    assert change.any() == (size > 0)
                    found.append(change)
        changes.append(found)
    for exact, rounded in zip(*changes, strict=True):
        assert (rounded - exact).norm() <= 0.02 * exact.norm()


def test_what_the_library_refuses_names_the_hyperparameters(atlas: ModelView) -> None:
    entry = TUNINGS["gralora"]
    with pytest.raises(InvalidRequest, match="gralora_k") as refusal:
        entry.build(atlas, entry.hyperparameters(r=9, gralora_k=2), 1)
    assert refusal.value.param == "hyperparameters"
