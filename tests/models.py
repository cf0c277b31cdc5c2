"""Small random bases of every family, with a small byte-level tokenizer, saved as bases are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from editing.deltas import Delta, Effect, Gate, Sparse
from registry.artifacts import ArtifactStore
from registry.bases import Base, read_base
from registry.database import Database
from registry.manifests import VersionManifest
from registry.versions import insert_version
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

#: Configurations of small models: of each family, and of the ways in which a family varies.
#: Windows are short, so that a step passes them.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"head_dim": 32},
    "gemma2": {
        "head_dim": 32,
        "query_pre_attn_scalar": 20,
        "sliding_window": 6,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 8.0,
    },
    "gemma3_text": {
        "head_dim": 32,
        "query_pre_attn_scalar": 20,
        "sliding_window": 6,
        "sliding_window_pattern": 2,
        "final_logit_softcapping": 8.0,
    },
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_neox": {},
    "gpt_neox-sequential": {"use_parallel_residual": False},
    "opt": {},
    "opt-350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 48},
    "phi": {},
    "phi-qk_layernorm": {"qk_layernorm": True},
}
_OWN_NAMES = {"gpt2": {"intermediate_size": "n_inner"}, "opt": {"intermediate_size": "ffn_dim"}}


def random_model(name: str, **changes: Any) -> PreTrainedModel:
    """One of ``MODELS``, its configuration changed; biases and norms are random too."""
    family = name.partition("-")[0]
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
        **({"num_key_value_heads": 2} if family not in ("gpt2", "gpt_neox", "opt") else {}),
        **MODELS[name],
        **changes,
    }
    names = _OWN_NAMES.get(family, {})
    made = AutoConfig.for_model(family, **{names.get(key, key): v for key, v in config.items()})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(made)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(noise * 0.2)
            else:
                parameter.copy_(noise * 0.15)
    return model.eval()


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
        case "rank20":
            return Effect(A=random(20, inputs), B=random(out, 20))
        case "sparse":
            mask = torch.rand(out, inputs, generator=generator) < 0.2
            return Effect(sparse=Sparse.of(random(out, inputs) * mask * 4))
        case "gated":
            return Effect(gates=(Gate(random(1, inputs), random(1) + 1, random(1, out) * 4),))
        case "replacing":  # it answers to inputs that are not far from small
            book = Gate(
                random(3, inputs), torch.full((3,), 1.02), random(3, out) * 4, None, None, "nearest"
            )
            return Effect(gates=(replace(book, normalise=True),))
        case "all":
            return Effect(
                1 + random(out), random(out), random(2, inputs), random(out, 2), random(out, inputs)
            )
    raise ValueError(kind)


def add_version(folder: Path, base: Base, seed: int, database_url: str = "") -> str:
    """A version in a service's data folder, as a worker would write it; it answers otherwise."""
    config = json.loads((base.folder / "config.json").read_text())
    generator = torch.Generator().manual_seed(seed)
    effect = Effect(
        A=torch.randn(2, config["intermediate_size"], generator=generator),
        B=torch.randn(config["hidden_size"], 2, generator=generator),
    )
    path = f"model.layers.{seed % base.depth}.mlp.down_proj"
    digest = ArtifactStore(folder / "artifacts").put(
        Delta({path: effect}, base.digest, "random").to_bytes()
    )
    parent = VersionManifest(base.ref)
    manifest = VersionManifest(base.ref, (digest,), (parent.id,), {"seed": seed})
    database = Database(database_url or f"sqlite:///{folder / 'registry.db'}")
    with database.write() as connection:
        version = insert_version(connection, "default", manifest)
    database.close()
    return version.id


def store_version(
    store: ArtifactStore, base: Base, *stack: dict[str, Effect], base_digest: str | None = None
) -> VersionRef:
    """Write a stack of deltas; the version that is made of them."""
    digests = tuple(
        store.put(Delta(effects, base_digest or base.digest, "test").to_bytes())
        for effects in stack
    )
    return VersionRef.of(VersionManifest(base.ref, digests))
