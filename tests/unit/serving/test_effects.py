"""Hooks put every version's effects on its own rows, on every kind of module."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from editing.deltas import Effect
from editing.deltas.fit import check_effects
from serving.effects import EffectHooks, Extent, padded
from serving.invariance import find_min_rows
from tests.models import VOCABULARY, random_effect, random_model

KINDS = ("rank1", "rank3", "dense", "sparse", "scale", "gated", "replacing", "all")
#: Every kind of module, with its outputs and inputs.
MODULES = {
    "llama": {
        "model.embed_tokens": (64, VOCABULARY),
        "model.layers.0.self_attn.q_proj": (64, 64),
        "model.layers.0.self_attn.k_proj": (32, 64),
        "model.layers.0.mlp": (64, 64),
        "model.layers.0.mlp.gate_proj": (96, 64),
        "model.layers.0.post_attention_layernorm": (64, 64),
        "model.layers.1.mlp.down_proj": (64, 96),
        "model.norm": (64, 64),
        "lm_head": (VOCABULARY, 64),
    },
    "gpt2": {
        "transformer.wte": (64, VOCABULARY),
        "transformer.wpe": (64, 512),
        "transformer.h.0.attn.c_attn": (192, 64),
        "transformer.h.0.mlp": (64, 64),
        "transformer.h.1.ln_2": (64, 64),
        "transformer.h.1.mlp.c_proj": (64, 96),
        "lm_head": (VOCABULARY, 64),
    },
    "qwen3": {
        "model.layers.0.self_attn.q_norm": (32, 32),
        "model.layers.1.self_attn.k_norm": (32, 32),
    },
    "gemma3": {
        "model.embed_tokens": (32, VOCABULARY),
        "model.layers.0.self_attn.q_norm": (16, 16),
        "model.layers.0.self_attn.k_norm": (16, 16),
        "model.layers.1.post_feedforward_layernorm": (32, 32),
    },
    "opt": {
        "model.decoder.embed_tokens": (32, VOCABULARY),
        "model.decoder.layers.0.fc2": (32, 48),
        "model.decoder.layers.1.final_layer_norm": (32, 32),
    },
}


def model_of(family: str) -> PreTrainedModel:
    small = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "pad_token_id": None,
    }
    torch.manual_seed(7)
    match family:
        case "gemma3":
            sizes = {"num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 48}
            return Gemma3ForCausalLM(Gemma3TextConfig(**small, **sizes)).eval()
        case "opt":
            return OPTForCausalLM(OPTConfig(**small, ffn_dim=48, word_embed_proj_dim=32)).eval()
    return random_model(family)


def versions_of(path: str, out: int, inputs: int, is_embedding: bool) -> dict[str, Effects]:
    """A version of each kind that touches a module, and one that does not."""
    kinds = [kind for kind in KINDS if not (is_embedding and kind in ("gated", "replacing"))]
    versions: dict[str, Effects] = {
        kind: {path: random_effect(seed, out, inputs, kind)} for seed, kind in enumerate(kinds)
    }
    if is_embedding:
        plain = versions["all"][path]
        versions["all"] = {path: Effect(plain.scale, plain.shift, plain.A, plain.B, plain.dense)}
    return {**versions, "base": {}}


Effects = Mapping[str, Effect]


def extents_of(counts: Mapping[str, int]) -> tuple[Extent, ...]:
    extents, row = [], 0
    for version, rows in counts.items():
        if rows:
            extents.append((version, row, row + rows))
        row += rows
    return tuple(extents)


def seen_at(model: PreTrainedModel, path: str, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What a module is given and gives in one forward."""
    seen: list[tuple[Tensor, Tensor]] = []

    def record(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((inputs[0].clone(), output.clone()))

    handle = model.get_submodule(path).register_forward_hook(record)
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return seen


def expected_at(
    x: Tensor,
    y: Tensor,
    module: nn.Module,
    effects: Mapping[str, Effects],
    extents: tuple[Extent, ...],
) -> Tensor:
    """Each version's effect on its tokens, the plain way. The tokens are one dimension of x."""
    total = extents[-1][2]
    axis = next(place for place, size in enumerate(x.shape) if size == total)
    out = y.clone()
    for version, start, stop in extents:
        for effect in effects[version].values():
            own = x.narrow(axis, start, stop - start)
            if isinstance(module, nn.Embedding):
                own = nn.functional.one_hot(own, module.num_embeddings).float()
            changed = effect.apply(own, y.narrow(axis, start, stop - start))
            out.narrow(axis, start, stop - start).copy_(changed)
    return out


#: Decode: one row each. Prefill: some of many rows, some of few.
LAYOUTS: dict[str, Callable[[int], int]] = {
    "decode": lambda place: 1,
    "prefill": lambda place: (9, 2, 1, 14)[place % 4],
}


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", MODULES)
@torch.inference_mode()
def test_each_kind_of_module_and_part(family: str, layout: str, gathered: bool) -> None:
    model = model_of(family)
    hooks = EffectHooks(model, 4, gathered=gathered)
    for path, shape in MODULES[family].items():
        module = model.get_submodule(path)
        effects = versions_of(path, *shape, isinstance(module, nn.Embedding))
        for version in effects.values():
            check_effects(model, version)
        counts = {version: LAYOUTS[layout](place) for place, version in enumerate(effects)}
        extents = extents_of(counts)
        ids = torch.randint(0, VOCABULARY, (1, extents[-1][2]))
        ((x, y),) = seen_at(model, path, ids)
        hooks.arrange(extents, extents, effects)
        ((same, changed),) = seen_at(model, path, ids)
        hooks.clear()
        assert torch.equal(x, same)
        expected = expected_at(x, y, module, effects, extents)
        assert not torch.allclose(expected, y, atol=1e-2)
        torch.testing.assert_close(changed, expected, rtol=1e-4, atol=1e-4)
        ((_, after),) = seen_at(model, path, ids)
        assert torch.equal(after, y), "cleared"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.inference_mode()
def test_gathered_is_the_loop_on_a_whole_model(family: str) -> None:
    """Every module touched at once, step after step, the head seeing other rows than the layers."""
    model = random_model(family)
    effects: dict[str, dict[str, Effect]] = {"base": {}}
    for place, version in enumerate("abcdef"):
        for number, (path, shape) in enumerate(MODULES[family].items()):
            kinds = ("rank1", "scale", "rank3", "dense", "sparse", "rank1", "none")
            if (kind := kinds[(place + number) % len(kinds)]) != "none":
                effect = random_effect(10 * place + number, *shape, kind)
                effects.setdefault(version, {})[path] = effect
    loop, gathered = EffectHooks(model, 4), EffectHooks(model, 4, gathered=True)
    for step in range(6):
        counts = {v: (3 * step + 7 * p) % 11 for p, v in enumerate(["a", "base", *"bcdef"])}
        rows = extents_of(counts)
        sampled = {version: min(1 + step % 2, count) for version, count in counts.items()}
        ends = [start + i for v, start, _ in rows for i in range(sampled[v])]
        ids = torch.randint(0, VOCABULARY, (1, max(4, sum(counts.values()))))
        pad = [0] * max(0, 4 - len(ends))
        found = []
        for hooks in (loop, gathered):
            hooks.arrange(rows, extents_of(sampled), effects)
            output = model(input_ids=ids, use_cache=False, logits_to_keep=torch.tensor(ends + pad))
            found.append(output.logits[0, : len(ends)])
            hooks.clear()
        torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_alone_and_in_company(kind: str) -> None:
    """The loop's promise, for every part: also for a rank and a gate of one."""
    few = find_min_rows(random_model("llama"))
    assert few is not None
    x, y = torch.randn(64, 96), torch.randn(64, 64)
    effect = padded(random_effect(3, 64, 96, kind))
    together = effect.apply(x, y)
    for count in (few, few + 1, few + 3, few + 12, few + 29):
        assert torch.equal(effect.apply(x[:count], y[:count]), together[:count]), count


def test_padding_changes_no_number() -> None:
    x, y = torch.randn(5, 96), torch.randn(5, 64)
    for kind in KINDS:
        effect = random_effect(1, 64, 96, kind)
        torch.testing.assert_close(padded(effect).apply(x, y), effect.apply(x, y))
    assert padded(random_effect(1, 64, 96, "rank1")).rank == 2
    (gate,) = padded(random_effect(1, 64, 96, "gated")).gates
    assert len(gate.keys) == 2


def test_what_does_not_fit_is_named() -> None:
    llama, opt = random_model("llama"), model_of("opt")
    path = "model.layers.0.mlp.down_proj"
    for kind, part in (
        ("rank3", "A"),
        ("dense", "dense"),
        ("sparse", "sparse"),
        ("gated", r"gates\.0\.keys"),
        ("scale", "scale"),
    ):
        with pytest.raises(ValueError, match=f"{path}.*{part} is"):
            check_effects(llama, {path: random_effect(1, 65, 97, kind)})
    book = random_effect(1, 64, 96, "replacing")
    with pytest.raises(ValueError, match="scale is"):
        check_effects(llama, {path: book.then(Effect(scale=torch.ones(65)))})
    embedding = random_effect(1, 64, VOCABULARY, "gated")
    with pytest.raises(ValueError, match="no gate can read"):
        check_effects(llama, {"model.embed_tokens": embedding})
    for unknown in ("model.layers.0", "model.layers.0.self_attn", "model.layers", "model"):
        with pytest.raises(ValueError, match="no linear, norm, embedding or MLP"):
            check_effects(llama, {unknown: Effect(shift=torch.ones(64))})
    positions = "model.decoder.embed_positions"
    with pytest.raises(ValueError, match=positions):
        check_effects(opt, {positions: Effect(shift=torch.ones(32))})
