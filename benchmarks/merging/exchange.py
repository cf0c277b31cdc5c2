"""Versions exported as PEFT adapters: what peft computes with them, beside the service's own."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.finetuning.methods import trainer_of
from benchmarks.finetuning.workload import examples
from benchmarks.merging.bench import Bench
from benchmarks.parts import Part
from editing.deltas import Effect
from editing.exchange.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from editing.exchange.peft import config_bytes, write_adapter
from editing.finetune.catalogue import TUNINGS
from editing.methods import METHODS
from editing.methods.interface import Task
from editing.models.view import ModelView
from editing.statistics import prepare
from registry.bases import Base

#: What is exported, with the hyperparameters that are not the methods' own.
EDITS: Mapping[str, Mapping[str, Any]] = {"rome": {"layer": 1}, "memit": {"layers": [0, 1, 2]}}
TUNED: Mapping[str, Any] = {"r": 8, "n_epochs": 4, "keep_weight": 0}
#: Of the model of GPT-2's shape.
LAYERS, HIDDEN, HEADS, CONTEXT = 4, 64, 4, 256
#: Texts whose logits are compared.
TEXTS = 20


def measure_exchange(bench: Bench) -> Part:
    """ROME, MEMIT in three layers and LoRA on atlas and on a random model of GPT-2's shape: the
    largest difference of a logit."""
    rows: list[dict[str, Any]] = []
    texts = bench.resources.references[:TEXTS]
    for view in (bench.view, gpt2(bench.view)):
        for name, effects in _versions(bench, view):
            bench.tell(f"exporting {name} on {view.base.name}")
            change, difference = _differences(view, effects, texts)
            own = {"method": name, "base": view.base.name}
            rows.append({**own, "change": change, "difference": difference})
    return Part(
        {"export_max_logit_difference": max(row["difference"] for row in rows)},
        {"exchange": rows},
    )


def gpt2(atlas: ModelView) -> ModelView:
    """A random model of GPT-2's shape, with atlas's tokenizer."""
    config = GPT2Config(
        vocab_size=len(atlas.tokenizer),
        n_positions=CONTEXT,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        bos_token_id=None,
        eos_token_id=atlas.tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(config)
    model.eval().requires_grad_(False)
    model.to(atlas.device)
    base = Base("gpt2-shaped", Path(), "0" * 64, "gpt2", LAYERS, CONTEXT, False)
    return ModelView(model, atlas.tokenizer, base)


def _versions(bench: Bench, view: ModelView) -> Iterator[tuple[str, Mapping[str, Effect]]]:
    resources = bench.follow(prepare(view, range(LAYERS), bench.scale.tokens // 10))
    requests = bench.requests(bench.sizes.seed, 1)
    for name, chosen in EDITS.items():
        entry = METHODS[name]
        own = bench.scale.settings(entry).model_copy(update=dict(chosen))
        steps = entry.load()(view, Task(requests), own, resources)
        yield name, bench.follow(steps, name).effects
    tuning, rows = TUNINGS["lora"], examples(next(iter(bench.tasks.values())))
    settled = tuning.hyperparameters(**TUNED).settled(len(rows))
    trainer = trainer_of(view, tuning, settled, rows, (), bench.sizes.seed)
    for step in trainer.run():
        bench.tell(f"{view.base.name}, {step.message}")
    yield "lora", trainer.delta("lora").effects


@torch.no_grad()
def _differences(
    view: ModelView, effects: Mapping[str, Effect], texts: Sequence[str]
) -> tuple[float, float]:
    """The largest of a logit: what the version changes, and where peft is away from it."""
    ids = view.pad([view.encode(text) for text in texts])
    before = view.logits(view.hidden(ids))
    with view.with_effects(effects):
        own = view.logits(view.hidden(ids))
    theirs = _with_peft(view, effects, ids)
    return float((own - before).abs().max()), float((own - theirs).abs().max())


def _with_peft(view: ModelView, effects: Mapping[str, Effect], ids: Tensor) -> Tensor:
    adapter = write_adapter(view, effects)
    with tempfile.TemporaryDirectory(prefix="errata-bench-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what one library says of another
        (Path(folder) / ADAPTER_CONFIG).write_bytes(config_bytes(adapter))
        (Path(folder) / ADAPTER_WEIGHTS).write_bytes(adapter.weights)
        loaded: Any = peft.PeftModel.from_pretrained(copy.deepcopy(view.model), folder)
    out: Tensor = loaded.eval()(ids).logits.float()
    return out
