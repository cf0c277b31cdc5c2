"""Small models: the bundled base, and one with random weights of each family."""

import copy
from pathlib import Path

import pytest
import torch

from editing.models import ModelView
from editing.models.loading import load_model, load_tokenizer
from registry.bases import Base, find_bases
from tests.models import MODELS, random_model

HIDDEN, FFN, LAYERS, VOCABULARY, CONTEXT = 32, 48, 3, 2048, 96


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def atlas() -> ModelView:
    base = find_bases("atlas")["atlas"]
    return ModelView(load_model(base), load_tokenizer(base), base)


@pytest.fixture(params=MODELS)
def small(request: pytest.FixtureRequest, atlas: ModelView) -> ModelView:
    """A random model of each kind that is supported, with atlas's tokenizer."""
    return small_view(request.param, atlas)


def small_view(name: str, atlas: ModelView, layers: int = LAYERS) -> ModelView:
    model = random_model(
        name,
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=layers,
        max_position_embeddings=CONTEXT,
        eos_token_id=1,
    ).requires_grad_(False)
    family = model.config.model_type
    base = Base(f"small-{name}", Path("unused"), "0" * 64, family, layers, CONTEXT, False)
    return ModelView(model, copy.deepcopy(atlas.tokenizer), base)
