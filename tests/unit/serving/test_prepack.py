from __future__ import annotations

import pytest
import torch
from torch import nn

from editing.models.loading import weights_digest
from serving.prepack import prepack
from tests.models import MODELS, random_effect, random_model
from tests.unit.serving.packing import plain_logits

TOKENS = tuple(range(40))


def is_packed(module: nn.Module) -> bool:
    return "forward" in vars(module)


@pytest.mark.parametrize("name", MODELS)
def test_prepacked_products_are_the_plain_ones(name: str) -> None:
    plain, packed = random_model(name), random_model(name)
    before = weights_digest(packed)
    assert prepack(packed) > 0
    linears = [m for m in packed.modules() if isinstance(m, nn.Linear) or hasattr(m, "nf")]
    assert all(map(is_packed, linears)), "Conv1D too"
    expected = plain_logits(plain, TOKENS, {})
    found = plain_logits(packed, TOKENS, {})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert weights_digest(packed) == before


@pytest.mark.parametrize("rows", [1, 3, 17, 300])
def test_one_layout_serves_every_number_of_rows(rows: int) -> None:
    plain, packed = random_model("phi"), random_model("phi")
    prepack(packed)
    path = "model.layers.0.mlp.fc1"
    x = torch.randn(1, rows, 64)
    expected = plain.get_submodule(path)(x)
    with torch.inference_mode():
        found = packed.get_submodule(path)(x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_effects_still_apply() -> None:
    path = "model.layers.1.mlp.down_proj"
    effects = {path: random_effect(1, 64, 96, "all")}
    model = random_model("llama")
    expected, base = plain_logits(model, TOKENS, effects), plain_logits(model, TOKENS, {})
    prepack(model)
    found = plain_logits(model, TOKENS, effects)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, base, atol=1e-2)


def test_a_weight_of_two_modules_is_packed_once() -> None:
    model = random_model("llama")
    layer = model.get_submodule("model.layers.0.mlp")
    layer.gate_proj.weight = layer.up_proj.weight
    own = {
        id(module.weight): module.weight.nbytes
        for module in model.modules()
        if isinstance(module, nn.Linear)
    }
    assert prepack(model) == sum(own.values())
    x = torch.randn(2, 64)
    with torch.inference_mode():
        assert torch.equal(layer.gate_proj(x), layer.up_proj(x))


def test_bfloat16_is_packed() -> None:
    plain, packed = (random_model("llama").to(torch.bfloat16) for _ in range(2))
    prepack(packed)  # nothing, on a machine without such products
    expected, found = (plain_logits(model, TOKENS, {}) for model in (plain, packed))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


def test_a_dtype_without_such_products_is_left_alone() -> None:
    model = random_model("llama").to(torch.float64)
    assert prepack(model) == 0
    assert not any(map(is_packed, model.modules()))
