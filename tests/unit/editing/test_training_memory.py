"""Rows fit the budget that training is given: the estimate against what a process really takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from editing.finetune.adapter import Adapter, linears
from editing.finetune.matrices import Matrices
from editing.finetune.memory import LONGEST, Plan, footprint, free_memory, plan
from editing.finetune.objectives.booster import Booster
from editing.finetune.objectives.keeping import Keeping
from editing.finetune.objectives.objective import Tuned
from editing.finetune.objectives.supervised import Supervised
from editing.finetune.rows import TrainingRow
from editing.finetune.trainer import Schedule, Trainer
from editing.models import ModelView
from registry.errors import JobFailed
from tests.unit.editing.conftest import small_view
from tests.unit.editing.test_finetune import SCHEDULE, adapter_for, rows_of

TOKENS = 512
#: A step of one text on a model of a few layers, in a process of its own: the growth of its peak.
STEP = f"""
import json, sys
import torch
from pathlib import Path
from benchmarks.finetuning.memory import PeakMemory
from editing.finetune.catalogue import TUNINGS
from editing.finetune.memory import footprint
from editing.finetune.rows import TrainingRow
from editing.finetune.trainer import Schedule, Trainer
from editing.models import ModelView
from registry.bases import Base
from tests.models import random_model

torch.set_num_threads(1)
checkpointing = sys.argv[1] == "with"
model = random_model(
    "llama", vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=10,
    max_position_embeddings={TOKENS},
).requires_grad_(False)
base = Base("x", Path("unused"), "0" * 64, "llama", 10, {TOKENS}, False)
view = ModelView(model, None, base)
entry = TUNINGS["lora"]
adapter = entry.build(view, entry.hyperparameters(r=4), 0)
short = TrainingRow(list(range(8)), range(1, 8))
row = TrainingRow([i % 512 for i in range({TOKENS})], range(1, {TOKENS}))
schedule = Schedule(1, 1, 1e-4, checkpointing=checkpointing)
list(Trainer(view, adapter, [short], schedule).run())
with PeakMemory(torch.device("cpu")) as memory:
    list(Trainer(view, adapter, [row], schedule).run())
print(json.dumps([memory.bytes, footprint(view, adapter, {TOKENS}, checkpointing).of(row)]))
"""


def measured(checkpointing: str) -> tuple[float, float]:
    # every large tensor is then given back at once: what is resident is what is in use
    allocator = {f"MALLOC_{name}_THRESHOLD_": str(2**16) for name in ("MMAP", "TRIM")}
    out = subprocess.run(
        [sys.executable, "-c", STEP, checkpointing],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **allocator},
        cwd=Path(__file__).parents[3],
    )
    grown, estimated = json.loads(out.stdout)
    return grown, estimated


def test_the_estimate_is_above_what_a_step_takes_and_not_far() -> None:
    plain, estimated = measured("without")
    assert estimated / 4 < plain < estimated
    least, estimated = measured("with")
    assert estimated / 4 < least < 1.2 * estimated
    assert least < 0.3 * plain


@pytest.fixture
def full(atlas: ModelView) -> tuple[ModelView, Adapter]:
    view = small_view("llama", atlas)
    return view, Matrices(view, linears(view))


def row(tokens: int) -> TrainingRow:
    return TrainingRow([5] * tokens, range(1, tokens))


def test_rows_are_as_long_as_fit(full: tuple[ModelView, Adapter]) -> None:
    view, adapter = full
    rows = [row(90), row(10)]
    without, with_it = (footprint(view, adapter, 90, choice) for choice in (False, True))
    assert with_it.of(rows[0]) < without.of(rows[0])
    assert plan(view, adapter, rows, 8, None, 10**12) == Plan(LONGEST, False)
    ample = round(without.fixed + 20 * without.of(rows[0]))
    found = plan(view, adapter, rows, 8, None, ample)
    assert 1024 <= found.tokens <= 2048
    assert not found.checkpointing
    scarce = round(without.fixed + 0.9 * without.of(rows[0]))
    assert plan(view, adapter, rows, 8, None, scarce).checkpointing
    for budget, checkpointing in ((ample, False), (round(ample / 5), True)):
        found = plan(view, adapter, rows, 8, 400, budget)
        assert (found.tokens, found.checkpointing) == (400, checkpointing)


def test_what_does_not_fit_says_place_and_cure(full: tuple[ModelView, Adapter]) -> None:
    view, adapter = full
    rows = [row(10), row(90)]
    with_it = footprint(view, adapter, 90, True)
    nothing = round(with_it.fixed + 0.5 * with_it.of(rows[1]))
    with pytest.raises(JobFailed, match=r"row 2 \(90 tokens\).*ERRATA_TRAINING_MEMORY") as refusal:
        plan(view, adapter, rows, 8, None, nothing)
    assert refusal.value.param == "training_file"
    one = round(with_it.fixed + 1.5 * with_it.of(rows[1]))
    with pytest.raises(JobFailed, match="a flat row of 400 tokens") as refusal:
        plan(view, adapter, rows, 8, 400, one)
    assert refusal.value.param == "hyperparameters.max_tokens"


def test_texts_to_keep_fit_too(full: tuple[ModelView, Adapter]) -> None:
    """Every token of theirs is looked at, twice, whatever little is learnt of rows."""
    view, adapter = full
    rows = [TrainingRow([5] * 90, [89])]
    each = footprint(view, adapter, 90, False)
    budget = each.fixed + 1.1 * each.of(rows[0])
    found = plan(view, adapter, rows, 8, None, round(budget))
    assert not found.checkpointing
    assert each.fixed + found.kept * (each.token + 5 / 3 * each.learnt) < budget
    assert 2 <= found.kept < 90 / 2
    texts = [TrainingRow([*range(40)], range(1, 40)), TrainingRow([7, 8, 9], range(1, 3))]
    short = [TrainingRow(text.ids[:8], range(1, min(8, text.size))) for text in texts]
    learnt = [TrainingRow([1, 2, 3], [1, 2])]
    told = []
    for given, kept in ((texts, 8), (short, LONGEST)):
        aim = Keeping(Supervised(), given, 1.0, 4)
        with torch.no_grad():
            for change in adapter.parameters():
                change.fill_(0.01)
        told.append(aim.backward(Tuned(view, adapter, 40, kept=kept), learnt, 0)["kept_kl"])
    assert told[0] == pytest.approx(told[1], rel=1e-4)
    assert told[0] > 1e-4


def test_harmful_rows_fit_too(full: tuple[ModelView, Adapter]) -> None:
    view, adapter = full
    booster = Booster([row(4), row(90)])
    others = Keeping(booster, [row(4)], 1.0, 1).others()
    with_it = footprint(view, adapter, 90, True)
    budget = round(with_it.fixed + 0.5 * with_it.of(row(90)))
    plan(view, adapter, [row(10)], 8, None, budget)
    with pytest.raises(JobFailed, match=r"^harmful row 2 \(90 tokens\)"):
        plan(view, adapter, [row(10)], 8, None, budget, others)


def test_scores_that_are_written_down_count(atlas: ModelView) -> None:
    """Soft caps and windows: Gemma 2 has both, Llama neither."""
    for name, grows in (("llama", False), ("gemma2", True)):
        view = small_view(name, atlas)
        adapter = Matrices(view, linears(view, ["q_proj"]))
        short, long = (footprint(view, adapter, n, False).token for n in (4, 64))
        assert (long > short) == grows


@pytest.mark.parametrize("name", ["lora", "said", "compacter"])
def test_checkpointing_trains_to_the_same_numbers(atlas: ModelView, name: str) -> None:
    view, ends = small_view("llama", atlas), []
    for checkpointing in (False, True):
        schedule: Schedule = replace(SCHEDULE, checkpointing=checkpointing)
        trainer = Trainer(view, adapter_for(name, view), rows_of(view), schedule)
        list(trainer.run(until=4))
        ends.append(torch.cat([p.detach().flatten() for p in trainer.adapter.parameters()]))
    assert torch.equal(*ends)


def test_free_memory_is_some_of_the_host() -> None:
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50
