"""Small models: the bundled base, and one with random weights of each family."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from editing.models import ModelView
from editing.models.loading import load_model, load_tokenizer
from registry.bases import FAMILIES, Base, find_bases

HIDDEN, FFN, LAYERS, VOCABULARY, CONTEXT = 32, 48, 3, 2048, 96
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def random_model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    gpt2 = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=4,
        n_inner=FFN,
        n_positions=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**COMMON, sliding_window=8)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**COMMON)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=8)),
        "gpt2": lambda: GPT2LMHeadModel(gpt2),
    }[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far enough from zero for every layer to matter
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def atlas() -> ModelView:
    base = find_bases("atlas")["atlas"]
    return ModelView(load_model(base), load_tokenizer(base), base)


@pytest.fixture(params=FAMILIES)
def small(request: pytest.FixtureRequest, atlas: ModelView) -> ModelView:
    """A random model of each supported family, with atlas's tokenizer."""
    return small_view(request.param, atlas)


def small_view(family: str, atlas: ModelView) -> ModelView:
    base = Base(f"small-{family}", Path("unused"), "0" * 64, family, LAYERS, CONTEXT, False)
    return ModelView(random_model(family), copy.deepcopy(atlas.tokenizer), base)
