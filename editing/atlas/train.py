"""Train atlas from its facts: ``python -m editing.atlas.train``.

A Llama of 5.6 M parameters over a byte-level BPE of 2048, trained with Muon on matrices and AdamW
on the rest. In half of the rows tokens after a subject see only its last token, so that
what is known of a subject sits there: where locate-then-edit methods look.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from editing.atlas.corpus import Corpus
from editing.atlas.facts import read_facts
from editing.atlas.packing import Row, collate, rows
from editing.atlas.recall import recall
from editing.atlas.tokenizer import save_tokenizer, train_tokenizer

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides the facts."""

    vocabulary: int = 2048
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    ffn: int = 768
    context: int = 512
    row: int = 96
    batch: int = 16
    steps: int = 1600
    muon_lr: float = 0.02
    adamw_lr: float = 3e-3
    warmup: int = 40
    decay: float = 0.6
    masked: float = 0.5
    seed: int = 0


def main(
    out: Annotated[Path, typer.Option(help="Folder to write the base to.")] = WEIGHTS,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = Recipe.steps,
    seed: Annotated[int, typer.Option(help="Decides corpus, initial weights and masks.")] = 0,
) -> None:
    console = Console()
    facts = read_facts()
    recipe = Recipe(steps=steps, seed=seed)
    tokenizer = train_tokenizer(facts, recipe.vocabulary)
    model = train(recipe, rows(Corpus(facts, recipe.seed), tokenizer, recipe.row), console)
    out.mkdir(parents=True, exist_ok=True)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    save_tokenizer(tokenizer, out, recipe.context)
    table = Table("wording", "greedy, whole object", title=f"atlas in {out}")
    for wording, share in recall(model, tokenizer, facts).items():
        table.add_row(wording, f"{share:.4f}")
    console.print(table)


def new_model(recipe: Recipe) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocabulary,
            hidden_size=recipe.hidden,
            intermediate_size=recipe.ffn,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def train(recipe: Recipe, source: Iterator[Row], console: Console) -> LlamaForCausalLM:
    """Minimise the next token's cross-entropy over the corpus."""
    model = new_model(recipe)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = (
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=0.0),
        torch.optim.AdamW(others, lr=recipe.adamw_lr, weight_decay=0.0),
    )
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: _rate(step, recipe)) for o in optimizers
    ]
    if shutil.which("c++"):  # a quarter faster, where it can compile
        model.model.compile()
    picker = random.Random(recipe.seed)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=recipe.steps)
        for step in range(recipe.steps):
            batch: list[Row] = list(islice(source, recipe.batch))
            masked = torch.tensor([picker.random() < recipe.masked for _ in batch])
            loss = _loss(model, *collate(batch, recipe.row, masked))
            torch.autograd.backward(loss)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
            if step % 20 == 0:
                progress.update(task, description=f"loss {loss.item():.3f}", completed=step)
        progress.update(task, completed=recipe.steps)
    return model.requires_grad_(False)


def _loss(model: LlamaForCausalLM, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        logits = model.lm_head(hidden[labels >= 0])
    return F.cross_entropy(logits.float(), labels[labels >= 0])


def _rate(step: int, recipe: Recipe) -> float:
    """Warm-up, then 1, then linear decay to 0 over the last share ``decay`` of the steps."""
    left = (recipe.steps - step) / (recipe.steps * recipe.decay)
    return min(1.0, (step + 1) / recipe.warmup, left)


if __name__ == "__main__":
    typer.run(main)
