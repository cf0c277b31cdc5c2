"""Small random bases of every family, with a small byte-level tokenizer, saved as bases are."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from editing.deltas import Delta, Effect
from registry.artifacts import ArtifactStore
from registry.bases import Base, read_base
from registry.manifests import VersionManifest
from serving.protocol import VersionRef

VOCABULARY = 320
CONTEXT = 512
EOS = "<|end|>"
CHAT = (
    "{% for message in messages %}{% if message['role'] == 'tool' %}"
    "{{ raise_exception('no tools here') }}{% endif %}"
    "{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

_COMMON = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_SMALL = {
    **_COMMON,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def random_model(family: str) -> PreTrainedModel:
    """A random model of a family; windows are short, so that a step passes them."""
    torch.manual_seed(7)
    match family:
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**_SMALL, tie_word_embeddings=True)).eval()
        case "mistral":
            return MistralForCausalLM(MistralConfig(**_SMALL, sliding_window=6)).eval()
        case "qwen2":
            config = Qwen2Config(
                **_SMALL, use_sliding_window=True, sliding_window=6, max_window_layers=1
            )
            return Qwen2ForCausalLM(config).eval()
        case "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**_SMALL, head_dim=32)).eval()
        case "gpt2":
            config = GPT2Config(
                **_COMMON, n_embd=64, n_layer=2, n_head=4, scale_attn_by_inverse_layer_idx=True
            )
            return GPT2LMHeadModel(config).eval()
    raise ValueError(family)


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``VOCABULARY`` tokens without a token before a text."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the capital of the country is the city in which the government of the land sits"
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def save_base(folder: Path, family: str, *, chat: bool = False) -> Base:
    """A base on disk, as ``ERRATA_BASES`` names it, called after its family."""
    random_model(family).save_pretrained(folder)
    tokenizer = small_tokenizer()
    if chat:
        tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return read_base(family, folder)


def random_effect(seed: int, out: int, inputs: int, kind: str) -> Effect:
    """An effect strong enough to change what is generated."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    match kind:
        case "rank1":
            return Effect(A=random(1, inputs), B=random(out, 1) * 4)
        case "rank3":
            return Effect(A=random(3, inputs), B=random(out, 3) * 2)
        case "dense":
            return Effect(dense=random(out, inputs))
        case "scale":
            return Effect(scale=1 + random(out) * 2, shift=random(out))
        case "all":
            return Effect(
                1 + random(out), random(out), random(2, inputs), random(out, 2), random(out, inputs)
            )
    raise ValueError(kind)


def store_version(
    store: ArtifactStore, base: Base, *stack: dict[str, Effect], base_digest: str | None = None
) -> VersionRef:
    """Write a stack of deltas; the version that is made of them."""
    digests = tuple(
        store.put(Delta(effects, base_digest or base.digest, "test").to_bytes())
        for effects in stack
    )
    return VersionRef.of(VersionManifest(base.ref, digests))
