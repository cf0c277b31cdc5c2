"""What is served: the shape of the model, the prompts, the edits, and how much of each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count, islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from benchmarks.serving.timing import Draw, Prompts
from editing.deltas import Effect
from registry.bases import Base, find_bases, read_base

#: Layers that a version's edit touches, by turns: one, two or three of them.
EDITED_LAYERS = 3


@dataclass(frozen=True)
class Scale:
    """The sizes of a whole bench. Model sizes as Llama names them."""

    vocabulary: int = 32_000
    hidden: int = 512
    layers: int = 8
    intermediate: int = 1536
    heads: int = 8
    kv_heads: int = 4
    context: int = 4096

    rounds: int = 5  # pairs of runs that count
    prompts: int = 32
    longest: int = 512
    longer: tuple[int, ...] = (1024, 2048)
    new_tokens: int = 64
    versions: int = 64
    mixed_tokens: int = 16
    peft_tokens: int = 8  # of the same requests, where peft takes half a minute
    equal_length: int = 64
    compared_steps: int = 5000
    resident: int = 256
    facts: int = 500  # of atlas, recalled in fp32 and bf16

    streams: int = 64  # over HTTP
    stream_tokens: int = 64
    atlas_tokens: int = 128
    swaps: int = 1000
    loaded_streams: int = 16
    calm_seconds: float = 2.5  # without swaps, in each round


FULL = Scale()
QUICK = Scale(
    vocabulary=512,
    hidden=64,
    layers=3,
    intermediate=96,
    heads=4,
    kv_heads=2,
    context=512,
    rounds=2,
    prompts=6,
    longest=64,
    longer=(96,),
    new_tokens=6,
    versions=6,
    mixed_tokens=4,
    peft_tokens=3,
    equal_length=12,
    compared_steps=60,
    resident=8,
    facts=20,
    streams=6,
    stream_tokens=12,
    atlas_tokens=12,
    swaps=10,
    loaded_streams=3,
    calm_seconds=0.5,
)


def lengths(prompts: int, longest: int) -> list[int]:
    """exp(N(4, 1)) clipped to 8 … ``longest``, the first set to ``longest``; seed 1."""
    normal = torch.randn(prompts, generator=torch.Generator().manual_seed(1)) + 4
    drawn: list[int] = normal.exp().clamp(8, longest).long().tolist()
    return [longest, *drawn[1:]]


def drawing(sizes: list[int], vocabulary: int) -> Draw:
    """Random prompts of these sizes, others at each call; the first have seed 1."""
    seeds = count(1)

    def draw() -> Prompts:
        generator = torch.Generator().manual_seed(next(seeds))
        ids = torch.randint(0, vocabulary, (sum(sizes),), generator=generator)
        return [part.tolist() for part in torch.split(ids, sizes)]

    return draw


def save_bench_base(folder: Path, scale: Scale, family: str = "llama") -> Base:
    """A base with random weights (seed 0) and a token of text for each id, without an end."""
    torch.manual_seed(0)
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if family == "gpt2":
        model: Any = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=scale.vocabulary,
                n_embd=scale.hidden,
                n_layer=scale.layers,
                n_head=scale.heads,
                n_positions=scale.context,
                **ends,
            )
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=scale.vocabulary,
                hidden_size=scale.hidden,
                intermediate_size=scale.intermediate,
                num_hidden_layers=scale.layers,
                num_attention_heads=scale.heads,
                num_key_value_heads=scale.kv_heads,
                max_position_embeddings=scale.context,
                **ends,
            )
        )
    model.save_pretrained(folder)
    _tokenizer(scale.vocabulary).save_pretrained(folder)
    return read_base("bench", folder)


def save_endless_atlas(folder: Path) -> Base:
    """Atlas without its end-of-sequence token, so that every stream runs its full length."""
    shutil.copytree(find_bases("atlas")["atlas"].folder, folder)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        file = folder / name
        body = json.loads(file.read_text())
        ends = [key for key in body if key in ("eos_token_id", "eos_token")]
        file.write_text(json.dumps({**body, **dict.fromkeys(ends)}))
    return read_base("atlas", folder)


def rank1_edits(base: Base, versions: int, first: int = 0) -> list[dict[str, Effect]]:
    """For each version random rank-1 effects, strong enough to change what is said.

    Seeds go on from ``first``.
    """
    return [
        {path: _random_effect(base, seed, rank=1) for path in edited_paths(base, seed)}
        for seed in range(first, first + versions)
    ]


def dense_edits(base: Base, versions: int) -> list[dict[str, Effect]]:
    """For each version one random dense effect."""
    return [
        {edited_paths(base, seed)[0]: _random_effect(base, seed, rank=0)}
        for seed in range(versions)
    ]


def edited_paths(base: Base, seed: int) -> list[str]:
    """The down projections of one, two or three layers in a row."""
    first = seed % base.depth
    layers = {(first + i) % base.depth for i in range(1 + seed % EDITED_LAYERS)}
    return [f"model.layers.{layer}.mlp.down_proj" for layer in sorted(layers)]


def _random_effect(base: Base, seed: int, *, rank: int) -> Effect:
    config: Mapping[str, Any] = json.loads((base.folder / "config.json").read_text())
    out, inputs = config["hidden_size"], config["intermediate_size"]
    generator = torch.Generator().manual_seed(seed)
    if rank == 0:
        return Effect(dense=torch.randn(out, inputs, generator=generator) * 0.1)
    A = torch.randn(rank, inputs, generator=generator)
    return Effect(A=A, B=torch.randn(out, rank, generator=generator))


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level: the 256 bytes, then words of letters up to ``vocabulary``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = (f"Ġ{''.join(letters)}" for letters in product(ascii_lowercase, repeat=4))
    texts = [*alphabet, *islice(words, vocabulary - len(alphabet))]
    model = models.BPE(vocab={text: id for id, text in enumerate(texts)}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False
    )
