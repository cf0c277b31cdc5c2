"""Every family computes packed what it computes alone; a family that does not is refused."""

from __future__ import annotations

import copy
from itertools import cycle

import pytest
import torch
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from editing.deltas import Effect
from editing.deltas.fit import check_effects
from editing.models.loading import weights_digest
from editing.models.view import PATHS
from registry.bases import FAMILIES
from registry.errors import UnsupportedModel
from serving.effects import padded
from serving.invariance import find_min_rows
from serving.runner import Runner
from serving.selftest import check_base
from tests.models import MODELS, VOCABULARY, random_effect, random_model
from tests.unit.serving.packing import (
    DEVICE,
    Effects,
    Script,
    packed_logits,
    plain_logits,
    random_script,
)

#: Whole and cut prompts, one token a step, steps in which a sequence rests; past every window.
COUNTS = ((9, 1, 1, 1, 1), (4, 7, 1, 1, 1), (0, 13, 1, 2, 1), (2, 1, 0, 5, 1), (0, 0, 1, 1, 1))


#: Versions of those sequences: one on every module, one on some, the base between them.
VERSIONS = ("every", "base", "some", "every", "base")


def shape(path: str, module: nn.Module, hidden: int) -> tuple[int, int] | None:
    """Outputs and inputs of a module that an effect may touch."""
    match module:
        case nn.Linear():
            return module.out_features, module.in_features
        case Conv1D():
            return module.nf, module.nx
        case nn.Embedding() if not path.endswith("embed_positions"):
            return module.embedding_dim, module.num_embeddings
        case _ if path.endswith(".mlp"):
            return hidden, hidden
        case _ if isinstance(weight := getattr(module, "weight", None), Tensor):
            return (len(weight), len(weight)) if weight.dim() == 1 else None
    return None


def versions_of(model: PreTrainedModel) -> dict[str, Effects]:
    """Effects of all kinds, by version; small enough not to blow up over the layers."""
    sizes = {
        path: size
        for path, module in model.named_modules()
        if (size := shape(path, module, model.config.hidden_size)) is not None
    }
    made: dict[str, dict[str, Effect]] = {"base": {}, "every": {}, "some": {}}
    kinds = cycle(("rank1", "scale", "dense", "rank3", "all"))
    for place, ((path, size), kind) in enumerate(zip(sizes.items(), kinds, strict=False)):
        made["every"][path] = faint(random_effect(place, *size, kind))
        if place % 3 == 0:
            made["some"][path] = faint(random_effect(100 + place, *size, "all"))
    return made


def faint(effect: Effect) -> Effect:
    """A tenth of an effect."""
    parts = {name: part if name == "A" else part * 0.1 for name, part in effect.parts().items()}
    if "scale" in parts:
        parts["scale"] = parts["scale"] + 0.9
    return padded(Effect(**parts))


def scripts() -> dict[str, Script]:
    return {
        f"s{place}": random_script(place, version, *counts, vocabulary=VOCABULARY)
        for place, (version, counts) in enumerate(zip(VERSIONS, COUNTS, strict=True))
    }


def test_there_is_a_small_model_of_every_family() -> None:
    assert {name.partition("-")[0] for name in MODELS} == set(FAMILIES) == set(PATHS)


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_packed_logits_of_mixed_versions_are_the_plain_ones(name: str, invariant: bool) -> None:
    model = random_model(name)
    own = copy.deepcopy(model).to(DEVICE)
    runner = Runner(own, kv_bytes=2**22, min_rows=4, batch_invariant=invariant)
    before = weights_digest(runner.model)
    effects = versions_of(model)
    for version in effects.values():
        check_effects(model, version)
    found = packed_logits(runner, scripts(), effects)
    assert len(found) == sum(count > 0 for counts in COUNTS for count in counts)
    for key, script in scripts().items():
        plain = plain_logits(model, script.tokens, effects[script.version])
        for (owner, length), logits in found.items():
            if owner == key:
                torch.testing.assert_close(logits, plain[length - 1], rtol=1e-4, atol=2e-4)
    assert weights_digest(runner.model) == before


@pytest.mark.parametrize("name", MODELS)
def test_each_effect_matters(name: str) -> None:
    """Without one of them the logits are others: the comparison with the plain forward sees it."""
    model = random_model(name)
    effects = versions_of(model)["every"]
    tokens = scripts()["s0"].tokens
    whole = plain_logits(model, tokens, effects)
    for path in effects:
        less = plain_logits(model, tokens, {p: e for p, e in effects.items() if p != path})
        assert (whole - less).abs().max() > 2e-3, path


@pytest.mark.parametrize("name", MODELS)
def test_logits_have_the_same_bits_alone_and_in_company(name: str) -> None:
    model = random_model(name)  # on the CPU
    min_rows = find_min_rows(model)
    assert min_rows is not None
    runner = Runner(model, kv_bytes=2**22, min_rows=min_rows, batch_invariant=True)
    effects = versions_of(model)
    more = {
        f"more{i}": random_script(
            90 + i, VERSIONS[2 * (i % 2)], 1 + i, 1, 1, 1, 1, vocabulary=VOCABULARY
        )
        for i in range(6)
    }
    together = packed_logits(runner, {**more, **scripts()}, effects)
    for key, script in scripts().items():
        for place, logits in packed_logits(runner, {key: script}, effects).items():
            assert torch.equal(logits, together[place]), place


@pytest.mark.parametrize("name", MODELS)
def test_every_family_passes_the_self_test(name: str) -> None:
    model = random_model(name)
    min_rows = find_min_rows(model)
    assert min_rows is not None
    runner = Runner(model, kv_bytes=2**22, min_rows=min_rows, batch_invariant=True)
    assert check_base(name, runner)


def test_a_model_that_attends_otherwise_is_refused_by_name() -> None:
    model = random_model("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(UnsupportedModel, match=r"'both_ways'.*gemma3_text.*differs"):
        check_base("both_ways", Runner(model.to(DEVICE), kv_bytes=2**22, min_rows=4))


def test_a_model_without_attention_interface_is_refused_by_name() -> None:
    config = BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=2)
    with pytest.raises(UnsupportedModel, match="bloom"):
        check_base("bloom", Runner(BloomForCausalLM(config).eval(), kv_bytes=2**22, min_rows=4))
