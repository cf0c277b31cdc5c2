"""What is exported computes the same elsewhere, and what is imported what it computed there."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load, save
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from editing.deltas import Effect, compose
from editing.deltas.lowrank import factorised
from editing.exchange.config import read_config
from editing.exchange.huggingface import write_merged
from editing.exchange.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RANKS
from editing.exchange.peft import Adapter, config_bytes, read_adapter, write_adapter
from editing.finetune.catalogue import TUNINGS
from editing.finetune.rows import training_row
from editing.finetune.trainer import Schedule, Trainer
from editing.methods import METHODS
from editing.methods.interface import Task
from editing.models import ModelView
from editing.models.loading import load_model, load_tokenizer, weights_digest
from editing.statistics import Resources, prepare
from registry.bases import read_base
from registry.errors import UnprocessableRequest
from registry.manifests import EditRequest
from tests.models import random_effect
from tests.unit.editing.conftest import FFN, HIDDEN, LAYERS, VOCABULARY, small_view

EDITS = [
    EditRequest("The capital of {} is", "France", "Rome", "Paris"),
    EditRequest("{} lies in", "Peru", "Asia", "South America"),
]
TEXTS = ["The capital of France is", "Peru lies in Asia.", "Silver has the symbol"]
CLOSE = 1e-5
DEPTH = 4  # of the small GPT-2: what the last layer writes reaches no later token
# peft 0.21 asks transformers by a name that it has given up
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
FEW = {"steps": 8, "essence_texts": 0, "wordings": 0, "prefixes": 0, "lookalike_weight": 0}
MADE = {
    "rome": FEW,
    "memit": {"layers": [0, 1, 2], "steps": 8, "essence_texts": 0},
    "lora": {"r": 4},
}


def finish(work: Any) -> Any:
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def resources_of(view: ModelView) -> Resources:
    if view.base.name == "atlas":
        return finish(prepare(view, range(3), 3000))
    source = torch.Generator().manual_seed(1)
    rows = [torch.randn(200, FFN, generator=source) for _ in range(DEPTH)]
    C = {layer: keys.T @ keys / 200 for layer, keys in enumerate(rows)}
    return Resources(C, 200, ("It is said. ", "So it was. "), (), ())


def made_by(view: ModelView, method: str, chosen: Mapping[str, Any]) -> dict[str, Effect]:
    """What a version of one edit or one fine-tuning does."""
    if method in METHODS:
        entry = METHODS[method]
        large = {} if view.base.name == "atlas" else {"learning_rate": 1.0, "clamp": 100}
        task, hyperparameters = Task(EDITS), entry.hyperparameters(**chosen, **large)
        delta = finish(entry.load()(view, task, hyperparameters, resources_of(view)))
    else:
        tuning = TUNINGS[method]
        adapter = tuning.build(view, tuning.hyperparameters(**chosen), 1)
        rows = [training_row(view, {"prompt": "Peru lies in", "completion": " Asia."})]
        trainer = Trainer(view, adapter, rows, Schedule(4, 1, 0.01, 24, 3))
        for _ in trainer.run():
            pass
        delta = trainer.delta(method)
    return compose([delta.effects])


def texts_of(view: ModelView) -> Tensor:
    return view.pad([view.encode(text) for text in TEXTS])


@torch.no_grad()
def logits(view: ModelView, effects: Mapping[str, Effect]) -> Tensor:
    with view.with_effects(effects):
        return view.logits(view.hidden(texts_of(view)))


def write(folder: Path, adapter: Adapter) -> Path:
    (folder / ADAPTER_CONFIG).write_bytes(config_bytes(adapter))
    (folder / ADAPTER_WEIGHTS).write_bytes(adapter.weights)
    return folder


@torch.no_grad()
def peft_logits(view: ModelView, folder: Path) -> Tensor:
    """Of a copy of the model with the adapter in it; a warning of what is missing is an error."""
    loaded: Any = PeftModel.from_pretrained(copy.deepcopy(view.model), folder)
    return loaded.eval()(texts_of(view)).logits.float()


@pytest.fixture(scope="module")
def gpt2(atlas: ModelView) -> ModelView:
    return small_view("gpt2", atlas, DEPTH)


@pytest.mark.parametrize("name", ["atlas", "gpt2"])
@pytest.mark.parametrize("method", MADE)
def test_a_version_computes_the_same_in_peft_and_back(
    atlas: ModelView, gpt2: ModelView, name: str, method: str, tmp_path: Path
) -> None:
    view = {"atlas": atlas, "gpt2": gpt2}[name]
    before = weights_digest(view.model)
    effects = made_by(view, method, MADE[method])
    expected = logits(view, effects)
    assert float((expected - logits(view, {})).abs().max()) > 100 * CLOSE
    adapter = write_adapter(view, effects)
    assert adapter.report["residual_energy"] == 0
    assert adapter.config["r"] in RANKS
    found = peft_logits(view, write(tmp_path, adapter))
    assert_close(found, expected, atol=CLOSE, rtol=0)
    back = read_adapter(view, read_config(config_bytes(adapter)), adapter.weights)
    assert back.keys() == effects.keys()
    assert_close(logits(view, back), expected, atol=CLOSE, rtol=0)
    assert weights_digest(view.model) == before


def test_every_layer_of_a_touched_kind_is_there_in_the_one_form(gpt2: ModelView) -> None:
    path = gpt2.down_proj(1)
    adapter = write_adapter(gpt2, {path: random_effect(0, HIDDEN, FFN, "rank3")})
    tensors, config = load(adapter.weights), adapter.config
    paths = [gpt2.down_proj(layer) for layer in range(DEPTH)]
    assert config["target_modules"] == paths
    assert (config["r"], config["lora_alpha"], config["bias"]) == (8, 8, "none")
    assert tensors.keys() == {
        f"base_model.model.{p}.lora_{part}.weight" for p in paths for part in "AB"
    }
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(8, FFN), (HIDDEN, 8)}
    touched = {name.split(".lora")[0] for name, tensor in tensors.items() if tensor.any()}
    assert touched == {f"base_model.model.{path}"}
    exact = write_adapter(gpt2, {path: random_effect(0, HIDDEN, FFN, "rank3")}, round_rank=False)
    assert exact.config["r"] == 3


@pytest.mark.parametrize("kind", ["dense", "sparse", "rank20", "rank3"])
def test_factors_are_the_nearest_of_their_rank(kind: str) -> None:
    effect = random_effect(4, 12, 30, kind)
    W = torch.randn(12, 30, generator=torch.Generator().manual_seed(2))
    change = (effect.weight(W) - W).double()
    S = torch.linalg.svdvals(change)
    for rank in (1, 2, 5, 12):
        found = factorised(effect, W, rank)
        assert found.rank <= rank
        product = found.B.double() @ found.A.double()
        total, lost = S.square().sum(), S[found.rank :].square().sum()
        share = float((change - product).square().sum() / total)
        assert share == pytest.approx(float(lost / total), abs=1e-9)
        assert found.residual_energy == pytest.approx(share, abs=1e-6)  # summed in fp32


def test_what_is_scaled_dense_or_sparse_is_as_near_as_its_rank(
    small: ModelView, tmp_path: Path
) -> None:
    path = small.down_proj(1)
    module = small.module(path)
    scale = 1 + torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1)) * 0.3
    # a bias would be scaled as well; where there is one, the scale stays out
    has_bias = getattr(module, "bias", None) is not None
    effects = {
        path: Effect(scale=None if has_bias else scale, dense=torch.randn(HIDDEN, FFN) * 0.1),
        small.down_proj(0): random_effect(5, HIDDEN, FFN, "sparse"),
    }
    expected = logits(small, effects)
    whole = write_adapter(small, effects)
    assert whole.report["residual_energy"] < 1e-10
    found = peft_logits(small, write(tmp_path, whole))
    assert_close(found, expected, atol=5e-5, rtol=1e-4)
    cut = write_adapter(small, effects, rank=4)
    assert 0 < cut.report["residual_energy"] < 1
    assert cut.report["modules"][path]["rank"] == 4


def test_embeddings_and_the_head_are_exported_apart(atlas: ModelView, tmp_path: Path) -> None:
    view = small_view("llama", atlas)  # its head is tied to its embedding
    effects = {
        "model.embed_tokens": random_effect(1, HIDDEN, VOCABULARY, "rank3"),
        "lm_head": random_effect(2, VOCABULARY, HIDDEN, "rank1"),
    }
    adapter = write_adapter(view, effects)
    assert {name for name in load(adapter.weights) if "embed" in name} == {
        f"base_model.model.model.embed_tokens.lora_embedding_{part}" for part in "AB"
    }
    expected = logits(view, effects)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):  # peft merges with care there
        found = peft_logits(view, write(tmp_path, adapter))
    assert_close(found, expected, atol=CLOSE, rtol=1e-5)
    back = read_adapter(view, read_config(config_bytes(adapter)), adapter.weights)
    assert_close(logits(view, back), expected, atol=CLOSE, rtol=1e-5)


@pytest.mark.parametrize(
    ("path", "effect", "said"),
    [
        ("transformer.h.0.mlp.c_proj", random_effect(1, HIDDEN, FFN, "gated"), "it has a gate"),
        ("transformer.h.0.mlp.c_proj", Effect(shift=torch.ones(HIDDEN)), "is shifted"),
        ("transformer.h.0.mlp.c_proj", Effect(scale=torch.full((HIDDEN,), 2.0)), "is shifted"),
        ("transformer.h.0.ln_2", Effect(scale=torch.full((HIDDEN,), 2.0)), "is a LayerNorm"),
        ("transformer.wte", Effect(scale=torch.full((HIDDEN,), 2.0)), "embedding is scaled"),
    ],
)
def test_what_no_adapter_holds_is_refused_by_name(
    gpt2: ModelView, path: str, effect: Effect, said: str
) -> None:
    with pytest.raises(UnprocessableRequest) as refused:
        write_adapter(gpt2, {path: effect})
    assert refused.value.code == "not_exportable"
    assert refused.value.message.startswith(f"{path}: ")
    assert said in refused.value.message
    with pytest.raises(UnprocessableRequest, match="nothing to export"):
        write_adapter(gpt2, {})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="effects are on another device there")
def test_a_scaled_bias_is_refused_on_a_gpu_as_well(gpt2: ModelView) -> None:
    view = replace(gpt2, model=copy.deepcopy(gpt2.model).cuda())
    effect = Effect(scale=torch.full((HIDDEN,), 2.0))
    with pytest.raises(UnprocessableRequest, match="is shifted"):
        write_adapter(view, {view.down_proj(0): effect})


PATTERNS = {
    "plain": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"0.mlp.down_proj": 2},
        "alpha_pattern": {"model.layers.1.mlp.down_proj": 16, "q_proj": 3},
        "use_rslora": True,
    },
    "some layers": {"r": 2, "layers_to_transform": [1], "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("name", PATTERNS)
def test_adapters_of_peft_compute_here_what_they_compute_there(
    atlas: ModelView, name: str, tmp_path: Path
) -> None:
    view = small_view("qwen2", atlas)
    config = LoraConfig(
        target_modules=["down_proj", "q_proj"], task_type="CAUSAL_LM", **PATTERNS[name]
    )
    trained: Any = get_peft_model(copy.deepcopy(view.model), config)
    source = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for key, parameter in trained.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.2)
        expected = trained.eval()(texts_of(view)).logits
    trained.save_pretrained(tmp_path)
    form = read_config((tmp_path / ADAPTER_CONFIG).read_bytes())
    effects = read_adapter(view, form, (tmp_path / ADAPTER_WEIGHTS).read_bytes())
    assert len(effects) == (2 if name == "some layers" else 2 * LAYERS)
    assert_close(logits(view, effects), expected, atol=CLOSE, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora is true"),
        ({"bias": "lora_only"}, 'bias is "lora_only"'),
        ({"lora_bias": True}, "lora_bias is true"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"some_future_option": 3}, "some_future_option is 3"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": math.inf}, "lora_alpha is inf"),
        ({"rank_pattern": {"(a+)+$": 2}}, "rank_pattern has the pattern"),
        ({"alpha_pattern": [1]}, "alpha_pattern is no object"),
        ({"layers_to_transform": "1"}, "layers_to_transform is '1'"),
        ({"target_modules": {"a": 1}}, "target_modules must be"),
    ],
)
def test_options_that_change_the_arithmetic_are_refused_by_name(
    change: dict[str, Any], said: str
) -> None:
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none", "use_dora": False}
    read_config(json.dumps(plain).encode())
    with pytest.raises(UnprocessableRequest) as refused:
        read_config(json.dumps({**plain, **change}).encode())
    assert said in refused.value.message
    assert refused.value.message.startswith("adapter_config.json: ")


@pytest.mark.parametrize("data", [b"", b"[" * 100_000, b"[]", b"\xff", b"null"])
def test_what_is_no_configuration_is_refused(data: bytes) -> None:
    with pytest.raises(UnprocessableRequest, match=r"adapter_config\.json"):
        read_config(data)


KEY = "base_model.model.transformer.h.0.mlp.c_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({KEY.format("A"): torch.ones(2, FFN)}, "it has A alone"),
        ({KEY.format("C"): torch.ones(2, FFN)}, "is no tensor of a plain LoRA"),
        ({"base_model.model.x.lora_magnitude_vector": torch.ones(2)}, "is no tensor of a plain"),
        (
            {KEY.format("A"): torch.ones(2, HIDDEN), KEY.format("B"): torch.ones(HIDDEN, 2)},
            "they would be",
        ),
        (
            {KEY.format("A"): torch.ones(3, FFN), KEY.format("B"): torch.ones(HIDDEN, 3)},
            "of rank 2",
        ),
        (
            {KEY.format("A"): torch.full((2, FFN), math.nan), KEY.format("B"): torch.ones(2, 2)},
            "not finite",
        ),
        (
            {KEY.format("A"): torch.ones(2, FFN).int(), KEY.format("B"): torch.ones(HIDDEN, 2)},
            "floating-point",
        ),
        (
            {KEY.format("A"): torch.ones(2, FFN), KEY.format("B"): torch.zeros(HIDDEN, 2)},
            "changes nothing",
        ),
        (
            {KEY.format(part).replace("h.0", "h.7"): torch.ones(2, 2) for part in ("A", "B")},
            "has no linear or embedding of that name",
        ),
        (
            {KEY.format(part).replace("mlp.c_proj", "ln_2"): torch.ones(2, 2) for part in "AB"},
            "has no linear or embedding of that name",
        ),
        (
            {KEY.format(part).replace("c_proj", "c_fc"): torch.ones(2, 2) for part in "AB"},
            "does not name it",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    gpt2: ModelView, tensors: dict[str, Tensor], said: str
) -> None:
    targets = ["mlp.c_proj", "ln_2"]
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": targets}
    with pytest.raises(UnprocessableRequest) as refused:
        read_adapter(gpt2, read_config(json.dumps(config).encode()), save(tensors))
    assert said in refused.value.message
    assert refused.value.code == "adapter_refused"
    with pytest.raises(UnprocessableRequest, match="not readable as safetensors"):
        read_adapter(gpt2, read_config(json.dumps(config).encode()), b"\x80\x04}.")


def in_bfloat16(view: ModelView) -> ModelView:
    return replace(view, model=copy.deepcopy(view.model).bfloat16())


@torch.no_grad()
def merged_logits(view: ModelView, folder: Path, **options: Any) -> Tensor:
    """Of what transformers loads; a weight that is missing or left over fails."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    return model.eval()(texts_of(view)).logits.float()


def test_a_merged_folder_computes_what_its_version_does(small: ModelView, tmp_path: Path) -> None:
    paths = small.paths
    last = f"{paths.layers}.{LAYERS - 1}"
    scale = 1 + 0.3 * torch.randn(HIDDEN, generator=torch.Generator().manual_seed(3))
    has_bias = isinstance(getattr(small.module(small.down_proj(1)), "bias", None), Tensor)
    effects = {
        small.down_proj(0): random_effect(1, HIDDEN, FFN, "rank3"),
        small.down_proj(1): Effect(scale=scale, shift=scale if has_bias else None),
        small.down_proj(2): random_effect(2, HIDDEN, FFN, "sparse"),
        f"{last}.{paths.gate_proj}": random_effect(3, FFN, HIDDEN, "dense"),
        f"{last}.{paths.mlp_norm}": Effect(scale=scale),
    }
    before, config = weights_digest(small.model), small.model.config.to_dict()
    report = write_merged(small, effects, tmp_path)
    assert report["dtype"] == "float32"
    assert report["residual_energy"] < 1e-12
    expected = logits(small, effects)
    assert float((expected - logits(small, {})).abs().max()) > 0.1
    assert_close(merged_logits(small, tmp_path), expected, atol=5e-5, rtol=1e-5)
    assert weights_digest(small.model) == before
    assert small.model.config.to_dict() == config


@pytest.mark.parametrize("touched", ["head", "embedding", "both"])
def test_a_tied_head_is_untied_where_it_is_edited(
    atlas: ModelView, touched: str, tmp_path: Path
) -> None:
    view = small_view("llama", atlas)
    assert view.module("lm_head").weight is view.module("model.embed_tokens").weight
    effects = {
        "lm_head": random_effect(2, VOCABULARY, HIDDEN, "rank1"),
        "model.embed_tokens": random_effect(1, HIDDEN, VOCABULARY, "rank3"),
    }
    effects.pop({"head": "model.embed_tokens", "embedding": "lm_head"}.get(touched, ""), None)
    write_merged(view, effects, tmp_path)
    assert_close(merged_logits(view, tmp_path), logits(view, effects), atol=CLOSE, rtol=1e-5)
    assert view.model.config.tie_word_embeddings
    assert view.module("lm_head").weight is view.module("model.embed_tokens").weight


def test_a_version_of_atlas_becomes_a_base_of_its_own(atlas: ModelView, tmp_path: Path) -> None:
    effects = {atlas.down_proj(2): random_effect(1, atlas.hidden_size, width(atlas), "rank1")}
    write_merged(atlas, effects, tmp_path)
    base = read_base("merged", tmp_path)
    view = ModelView(load_model(base), load_tokenizer(base), base)
    assert base.has_chat_template
    assert_close(logits(view, {}), logits(atlas, effects), atol=CLOSE, rtol=0)


def test_what_rounding_takes_of_a_change_is_told(atlas: ModelView, tmp_path: Path) -> None:
    view = in_bfloat16(small_view("llama", atlas))
    effects = {view.down_proj(0): random_effect(1, HIDDEN, FFN, "rank1")}
    large = write_merged(view, effects, tmp_path)
    small = {path: effect.map(lambda part: part * 0.05) for path, effect in effects.items()}
    told = write_merged(view, small, tmp_path)
    assert large["dtype"] == told["dtype"] == "bfloat16"
    assert 0 < large["residual_energy"] < 1e-3 < told["residual_energy"]


@pytest.mark.parametrize(
    ("family", "path", "effect", "said"),
    [
        ("llama", "model.layers.0.mlp.down_proj", random_effect(1, HIDDEN, FFN, "gated"), "a gate"),
        ("llama", "model.layers.0.mlp.down_proj", Effect(shift=torch.ones(HIDDEN)), "no bias"),
        ("llama", "model.layers.0.mlp", Effect(scale=torch.ones(HIDDEN) * 2), "no weight"),
        ("gemma2", "model.embed_tokens", Effect(scale=torch.ones(HIDDEN) * 2), "no weight"),
        ("llama", "model.norm", random_effect(1, HIDDEN, HIDDEN, "rank1"), "no matrix"),
    ],
)
def test_what_no_weight_holds_is_refused_by_name(
    atlas: ModelView, family: str, path: str, effect: Effect, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UnprocessableRequest) as refused:
        write_merged(small_view(family, atlas), {path: effect}, tmp_path)
    assert refused.value.code == "not_exportable"
    assert refused.value.message.startswith(f"{path}: ")
    assert said in refused.value.message
    assert list(tmp_path.iterdir()) == []


def width(view: ModelView) -> int:
    matrix = view.matrix(view.down_proj(0))
    assert matrix is not None
    return matrix.shape[1]
