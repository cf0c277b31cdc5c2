"""What the parts of the bench share: the base, versions as files, and merges of them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.atlas import AtlasBench
from benchmarks.editing.bench import Bench as EditingBench
from benchmarks.finetuning.memory import PeakMemory
from benchmarks.finetuning.methods import trainer_of
from benchmarks.finetuning.workload import examples, new_relation, old_facts
from benchmarks.merging.workload import EDITOR, RELATIONS, Scale
from editing.deltas import Delta, DeltaFile, DeltaWriter
from editing.finetune.catalogue import TUNINGS
from editing.merging import MERGES, MergeEntry
from editing.merging.changes import Input
from editing.merging.merge import METHOD, Plan, merge
from editing.metrics.targets import greedy_matches
from registry.artifacts import ArtifactStore
from registry.manifests import Fact


@dataclass(frozen=True)
class Merged:
    """A merge: its delta, and what making it took."""

    delta: Delta
    seconds: float
    peak_memory: int | None


class Bench(EditingBench):
    """One run of the bench.

    Args:
        sizes: of what is merged.
        methods: names of the merges that take part.
        folder: where deltas lie.
    """

    def __init__(
        self,
        sizes: Scale,
        methods: Sequence[str],
        device: str,
        console: Console,
        threads: int,
        folder: Path,
    ) -> None:
        super().__init__(sizes.editing, [EDITOR], device, console)
        self.sizes, self.threads, self.folder = sizes, threads, folder
        self.merges = [MERGES[name] for name in methods]
        self.store = ArtifactStore(folder)

    # -- versions ----------------------------------------------------------------------------------

    @cached_property
    def tasks(self) -> dict[str, list[tuple[str, str]]]:
        """By name, the facts of each new relation."""
        return {
            name: new_relation(self.sizes.facts, self.sizes.seed + place, relation)
            for place, (name, relation) in enumerate(RELATIONS.items())
        }

    @cached_property
    def tuned(self) -> dict[str, Delta]:
        """By name, a version that learnt the relation."""
        return {name: self._tuned(name) for name in self.tasks}

    def _tuned(self, name: str) -> Delta:
        """With a seed of its own: adapters that begin with the same factors get in each other's
        way."""
        entry, texts = TUNINGS["lora"], self.resources.texts
        rows = examples(self.tasks[name], RELATIONS[name])
        chosen = entry.hyperparameters(**self.sizes.tuning).settled(len(rows))
        seed = self.sizes.seed + [*RELATIONS].index(name)
        trainer = trainer_of(self.view, entry, chosen, rows, texts, seed)
        for step in trainer.run():
            self.tell(f"learning {name}, {step.message}")
        return trainer.delta(entry.name)

    # -- what is asked -----------------------------------------------------------------------------

    def right(self, name: str) -> float:
        """The share of a new relation's facts that the model gives greedily."""
        wording = RELATIONS[name].trained[0]
        pairs = [(wording.format(subject), object_) for subject, object_ in self.tasks[name]]
        found = greedy_matches(self.view, pairs)
        return sum(found) / len(found)

    @cached_property
    def known(self) -> list[Fact]:
        """Those of the old facts that the base gives greedily."""
        facts = old_facts(self.sizes.old, self.sizes.seed)
        found = greedy_matches(self.view, [(fact.prompt, fact.target) for fact in facts])
        return [fact for fact, is_right in zip(facts, found, strict=True) if is_right]

    def old_lost(self) -> float:
        """The share of them that it no longer gives."""
        found = greedy_matches(self.view, [(fact.prompt, fact.target) for fact in self.known])
        return 1 - sum(found) / len(found)

    # -- merges ------------------------------------------------------------------------------------

    def merged(
        self, entry: MergeEntry, deltas: Sequence[Delta], hyperparameters: Mapping[str, Any] = {}
    ) -> Merged:
        """A merge of versions of one delta each, made in a process of its own.

        There no freed memory of other work hides what the merge takes.
        """
        self.tell(f"merging by {entry.name}")
        digests = [self.store.put(delta.to_bytes()) for delta in deltas]
        given = (entry.name, digests, hyperparameters, self.sizes.seed)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            made = pool.submit(merge_files, *given, self.folder, self.device, self.threads)
            digest, seconds, peak = made.result()
        return Merged(Delta.from_bytes(self.store.get(digest)), seconds, peak)


def merge_files(
    name: str,
    digests: Sequence[str],
    hyperparameters: Mapping[str, Any],
    seed: int,
    folder: Path,
    device: str,
    threads: int,
) -> tuple[str, float, int | None]:
    """Merge deltas of a store, in this process: the result's digest, seconds, bytes at most."""
    torch.set_num_threads(threads)
    view, store = AtlasBench(device, Console(quiet=True)).view, ArtifactStore(folder)
    entry = MERGES[name]
    plan = Plan(entry, entry.hyperparameters(**hyperparameters), seed)
    inputs = [Input(digest, [DeltaFile(store.file(digest))]) for digest in digests]
    with PeakMemory(view.device) as memory:
        started = time.perf_counter()
        with store.scratch() as place, (place / "numbers").open("w+b") as scratch:
            writer = DeltaWriter(scratch, view.base.digest, METHOD)
            for _ in merge(view, inputs, plan, writer):
                pass
            digest = store.put_chunks(writer.chunks())
        seconds = time.perf_counter() - started
    return digest, seconds, memory.bytes
