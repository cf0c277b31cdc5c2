"""Every method on one task: a relation to learn, and all that is known besides to keep."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from typing import Any

import torch
from rich.console import Console

from benchmarks.finetuning.bench import Before, Bench
from benchmarks.finetuning.memory import PeakMemory
from benchmarks.finetuning.workload import BIRDS, Scale, examples, preferences
from benchmarks.kept import Kept, Row
from benchmarks.parts import Part
from editing.datasets.training import PREFERENCES
from editing.finetune.catalogue import TUNINGS, TuningEntry
from editing.finetune.hyperparameters import TuningHyperparameters
from editing.finetune.memory import SHARE, free_memory, plan
from editing.finetune.objectives.build import objective
from editing.finetune.trainer import Schedule, Trainer
from editing.models.loading import weights_digest
from editing.models.view import ModelView
from registry.errors import ErrataError, JobFailed

#: What a row holds, in the order it is shown.
COLUMNS = {
    "new_relation": "new facts",
    "other_wording": "other wording",
    "old_facts_lost": "old lost",
    "me_ppl_ratio": "ME-PPL ratio",
    "train_loss": "loss",
    "trained_numbers": "numbers",
    "delta_bytes": "bytes",
    "peak_memory": "peak MB",
    "seconds": "s",
    "cpu_seconds": "CPU s",
}
#: Where the source lies that a row depends on.
SOURCE = ("benchmarks/finetuning", "editing")


def measure_methods(bench: Bench) -> Part:
    """A row a method, by its own defaults; one that fails has a row that says why.

    Each runs in a fresh process: what another has freed does not hide the memory that it takes.

    Raises:
        InvalidRequest: rows are kept in a file of other code or settings.
    """
    about = {"scale": asdict(bench.scale), "device": bench.device, "threads": bench.threads}
    kept = Kept(bench.kept, SOURCE, **about)
    found: dict[str, Row] = {row["method"]: row for row in kept.rows}
    missing = [name for name in bench.methods if name not in found]
    spawn = get_context("spawn")
    with ProcessPoolExecutor(bench.jobs, spawn, max_tasks_per_child=1) as pool:
        shared = bench.scale, bench.device, bench.threads, bench.before if missing else None
        for future in as_completed([pool.submit(measure, name, *shared) for name in missing]):
            row = future.result()
            found[row["method"]] = row
            kept.add(row)
            bench.console.log(told(row))
            bench.tell(f"{len(found)}/{len(bench.methods)} methods")
    rows = [found[name] for name in bench.methods]
    figures = {}
    for row in rows:
        if row["method"] == "lora" and "error" not in row:
            figures = {f"lora_{name}": row[name] for name in ("new_relation", "old_facts_lost")}
    return Part(figures, {"methods": rows})


def measure(name: str, scale: Scale, device: str, threads: int, before: Before | None) -> Row:
    """One method's row, in this process."""
    torch.set_num_threads(threads)
    bench = Bench(scale, [name], device, Console(quiet=True), before=before)
    untouched = weights_digest(bench.view.model)
    try:
        row = _row(bench, TUNINGS[name])
        if weights_digest(bench.view.model) != untouched:
            raise JobFailed("the base's weights changed")
    except (ErrataError, RuntimeError) as error:
        row = {"error": f"{type(error).__name__}: {error}"}
    return {"method": name, **row}


def _row(bench: Bench, entry: TuningEntry) -> Row:
    view, relation, before = bench.view, bench.relation, bench.before
    found = examples(relation)
    if entry.rows == PREFERENCES:
        found = preferences(relation, bench.scale.seed)
    chosen = bench.settings(entry, len(found))
    with PeakMemory(view.device) as memory:
        started, cpu_started = time.perf_counter(), time.process_time()
        trainer = trainer_of(view, entry, chosen, found, before.texts, bench.scale.seed)
        *_, last = trainer.run()
        delta = trainer.delta(entry.name)
        seconds = time.perf_counter() - started
        cpu_seconds = time.process_time() - cpu_started
    with view.with_effects(delta.effects):
        asked = [bench.right(wording, relation) for wording in (BIRDS.trained[0], BIRDS.untrained)]
        kept, ppl = bench.known(before.known), bench.me_ppl(before.references)
    return {
        "new_relation": asked[0],
        "other_wording": asked[1],
        "old_facts_lost": 1 - len(kept) / len(before.known),
        "me_ppl_ratio": ppl / before.me_ppl,
        "train_loss": last.metrics["train_loss"],
        "trained_numbers": trainer.adapter.trainable(),
        "delta_bytes": len(delta.to_bytes()),
        "peak_memory": memory.bytes,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "steps": trainer.total,
        "learning_rate": chosen.learning_rate,
    }


def trainer_of(
    view: ModelView,
    entry: TuningEntry,
    chosen: TuningHyperparameters,
    found: Sequence[Mapping[str, Any]],
    texts: Sequence[str],
    seed: int,
) -> Trainer:
    """The run of a job with these rows, and texts to keep, in the memory that is free."""
    aim = objective(view, chosen, {}, [], texts)
    rows = aim.rows(view, found)
    adapter = entry.build(view, chosen, seed)
    size, budget = int(chosen.batch_size), round(SHARE * free_memory(view.device))
    planned = plan(view, adapter, rows, size, None, budget)
    return Trainer(view, adapter, rows, Schedule.of(chosen, planned, seed), objective=aim)


def told(row: Row) -> str:
    """A row in one line."""
    values = ", ".join(f"{title} {row[name]:.4g}" for name, title in COLUMNS.items() if name in row)
    return f"{row['method']}: {row.get('error', values)}"
