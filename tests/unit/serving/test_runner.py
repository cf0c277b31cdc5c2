from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, Gemma2Config, Gemma2ForCausalLM

from editing.deltas import Effect
from editing.models.loading import load_model, weights_digest
from registry.bases import FAMILIES, Base
from registry.errors import UnsupportedModel
from serving.effects import check_effects, padded
from serving.invariance import find_min_rows
from serving.plan import Segment, StepPlan
from serving.runner import Runner
from serving.selftest import check_base
from tests.models import VOCABULARY, random_effect
from tests.unit.serving.packing import Effects, Script, packed_logits, plain_logits, random_script

#: Modules of each family and the kinds of effect that are put on them.
TOUCHED = {
    "llama": {
        "model.embed_tokens": "rank3",
        "model.layers.0.self_attn.q_proj": "rank1",
        "model.layers.0.mlp": "scale",
        "model.layers.1.mlp.down_proj": "all",
        "model.layers.1.input_layernorm": "scale",
        "lm_head": "rank3",
    },
    "mistral": {
        "model.layers.0.mlp.gate_proj": "scale",
        "model.layers.1.self_attn.v_proj": "dense",
        "lm_head": "scale",
    },
    "qwen2": {"model.layers.0.self_attn.k_proj": "rank3", "model.layers.1.mlp.down_proj": "rank1"},
    "qwen3": {"model.layers.0.self_attn.o_proj": "dense", "model.layers.1.mlp.up_proj": "rank3"},
    "gpt2": {
        "transformer.wte": "dense",
        "transformer.h.0.attn.c_attn": "rank3",
        "transformer.h.1.mlp.c_proj": "dense",
        "transformer.h.1.ln_2": "scale",
    },
}
SHAPES = {
    "model.embed_tokens": (64, VOCABULARY),
    "lm_head": (VOCABULARY, 64),
    "model.layers.0.self_attn.q_proj": (64, 64),
    "model.layers.0.self_attn.k_proj": (32, 64),
    "model.layers.1.self_attn.v_proj": (32, 64),
    "model.layers.0.self_attn.o_proj": (64, 128),
    "model.layers.0.mlp": (64, 64),
    "model.layers.0.mlp.gate_proj": (96, 64),
    "model.layers.1.mlp.up_proj": (96, 64),
    "model.layers.1.mlp.down_proj": (64, 96),
    "model.layers.1.input_layernorm": (64, 64),
    "transformer.wte": (64, VOCABULARY),
    "transformer.h.0.attn.c_attn": (192, 64),
    "transformer.h.1.mlp.c_proj": (64, 256),
    "transformer.h.1.ln_2": (64, 64),
}
#: Whole and cut prompts, one token a step, steps in which a sequence rests; past every window.
COUNTS = ((9, 1, 1, 1, 1), (4, 7, 1, 1, 1), (0, 13, 1, 2, 1), (2, 1, 0, 5, 1), (0, 0, 1, 1, 1))


def effects_of(family: str, seed: int) -> Effects:
    return {
        path: padded(random_effect(seed + place, *SHAPES[path], kind))
        for place, (path, kind) in enumerate(TOUCHED[family].items())
    }


def scripts(versions: list[str]) -> dict[str, Script]:
    return {
        f"s{place}": random_script(place, version, *counts, vocabulary=VOCABULARY)
        for place, (version, counts) in enumerate(zip(versions, COUNTS, strict=True))
    }


def runner_of(base: Base) -> Runner:
    return Runner(load_model(base), slots=400, min_rows=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_of_mixed_versions_are_the_plain_ones(
    family: str, saved: Callable[[str], Base]
) -> None:
    runner, model = runner_of(saved(family)), load_model(saved(family))
    before = weights_digest(runner.model)
    effects: dict[str, Effects] = {"base": {}, "a": effects_of(family, 1)}
    effects["b"] = effects_of(family, 50)
    for version in effects:
        check_effects(runner.model, effects[version])
    chosen = scripts(["a", "base", "b", "a", "base"])
    found = packed_logits(runner, chosen, effects)
    assert len(found) == sum(count > 0 for counts in COUNTS for count in counts)
    distinct = set()
    for key, script in chosen.items():
        plain = plain_logits(model, script.tokens, effects[script.version])
        unedited = plain_logits(model, script.tokens, {})
        distinct.add(script.version if not torch.equal(plain, unedited) else "base")
        for (own, length), logits in found.items():
            if own == key:
                torch.testing.assert_close(logits, plain[length - 1], rtol=1e-4, atol=2e-4)
    assert distinct == {"base", "a", "b"}, "the effects must matter for this test to say anything"
    assert weights_digest(runner.model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_have_the_same_bits_alone_and_in_company(
    family: str, saved: Callable[[str], Base]
) -> None:
    runner = runner_of(saved(family))
    effects = {"base": {}, "a": effects_of(family, 1), "b": effects_of(family, 50)}
    company = scripts(["a", "base", "b", "a", "base"])
    more = {
        f"more{i}": random_script(90 + i, "ab"[i % 2], 1 + i, 1, 1, 1, 1, vocabulary=VOCABULARY)
        for i in range(6)
    }
    together = packed_logits(runner, {**more, **company}, effects)
    for key, script in company.items():
        for place, logits in packed_logits(runner, {key: script}, effects).items():
            assert torch.equal(logits, together[place]), place


def test_without_padding_bits_depend_on_the_batch_where_min_rows_says_so(
    saved: Callable[[str], Base],
) -> None:
    base = saved("llama")
    needed = find_min_rows(load_model(base))
    runner = Runner(load_model(base), slots=400, min_rows=1)
    company = scripts(["base"] * 5)
    together = packed_logits(runner, company, {"base": {}})
    alone = packed_logits(runner, {"s0": company["s0"]}, {"base": {}})
    is_equal = all(torch.equal(logits, together[place]) for place, logits in alone.items())
    assert is_equal == (needed == 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_the_self_test(family: str, saved: Callable[[str], Base]) -> None:
    model = load_model(saved(family))
    min_rows = find_min_rows(model)
    assert min_rows is not None
    assert check_base(family, Runner(model, slots=64, min_rows=min_rows))


def test_bfloat16_passes_the_self_test(saved: Callable[[str], Base]) -> None:
    check_base("llama", Runner(load_model(saved("llama"), "bfloat16"), slots=64, min_rows=4))


def test_a_family_that_attends_otherwise_is_refused_by_name() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.5,
        attn_logit_softcapping=0.5,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    model = Gemma2ForCausalLM(config).eval()
    with pytest.raises(UnsupportedModel, match="gemma2"):
        check_base("soft", Runner(model, slots=64, min_rows=4))


def test_a_family_without_attention_interface_is_refused_by_name() -> None:
    config = BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=2)
    with pytest.raises(UnsupportedModel, match="bloom"):
        check_base("bloom", Runner(BloomForCausalLM(config).eval(), slots=64, min_rows=4))


def test_effects_that_do_not_fit_are_named(saved: Callable[[str], Base]) -> None:
    model = load_model(saved("llama"))
    for path in ("model.layers.9.mlp.down_proj", "model", "model.layers.0", "model.layers.0.mlp.x"):
        with pytest.raises(ValueError, match=path):
            check_effects(model, {path: Effect(shift=torch.zeros(64))})
    with pytest.raises(ValueError, match=r"down_proj.*\(64, 96\)"):
        check_effects(model, {"model.layers.0.mlp.down_proj": Effect(dense=torch.zeros(96, 64))})


def test_a_full_row_of_no_logits_is_fine(saved: Callable[[str], Base]) -> None:
    """A step may hold only the beginnings of prompts."""
    runner = runner_of(saved("llama"))
    part = Segment("a", "v", (1, 2, 3), 0, 0, False)
    assert runner.logits(StepPlan((part,)), {"v": effects_of("llama", 1)}).shape == (0, VOCABULARY)
