"""What the parts of the bench share: the base, the task, and what is asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.console import Console

from benchmarks.atlas import AtlasBench
from benchmarks.finetuning.workload import Scale, new_relation, old_facts
from editing.finetune.catalogue import TuningEntry
from editing.finetune.hyperparameters import TuningHyperparameters
from editing.metrics.perplexity import me_ppl
from editing.metrics.targets import greedy_matches
from editing.statistics import prepare
from registry.manifests import Fact


@dataclass(frozen=True)
class Before:
    """What is known of the base before any method.

    Attributes:
        texts: that it wrote; methods may keep its predictions of them.
        references: others that it wrote, behind the perplexity.
        known: those of the old facts that it gives greedily.
        me_ppl: of the references.
    """

    texts: tuple[str, ...]
    references: tuple[str, ...]
    known: tuple[Fact, ...]
    me_ppl: float


class Bench(AtlasBench):
    """One run of the bench.

    Args:
        scale: its sizes.
        methods: names of those that take part.
        device: of the base.
        console: told what is under way.
        threads: of a process.
        jobs: how many methods are measured at once, each in a process of its own.
        before: where it is known already.
        kept: a file where rows are kept as they are measured, and taken from.
    """

    def __init__(
        self,
        scale: Scale,
        methods: Sequence[str],
        device: str,
        console: Console,
        threads: int = 1,
        jobs: int = 1,
        before: Before | None = None,
        kept: Path | None = None,
    ) -> None:
        super().__init__(device, console)
        self.scale, self.methods, self.threads, self.jobs = scale, methods, threads, jobs
        self._before, self.kept = before, kept

    @cached_property
    def relation(self) -> list[tuple[str, str]]:
        return new_relation(self.scale.facts, self.scale.seed)

    def settings(self, entry: TuningEntry, rows: int) -> TuningHyperparameters:
        """A method's own, but for those that the scale sets."""
        return entry.hyperparameters(**self.scale.hyperparameters).settled(rows)

    # -- what is asked ---------------------------------------------------------------------------

    def right(self, wording: str, relation: Sequence[tuple[str, str]]) -> float:
        """The share of a relation's facts that the model gives greedily."""
        pairs = [(wording.format(subject), bird) for subject, bird in relation]
        found = greedy_matches(self.view, pairs)
        return sum(found) / len(found)

    def known(self, facts: Sequence[Fact]) -> list[Fact]:
        """Those that the model gives greedily."""
        found = greedy_matches(self.view, [(fact.prompt, fact.target) for fact in facts])
        return [fact for fact, is_right in zip(facts, found, strict=True) if is_right]

    def me_ppl(self, references: Sequence[str]) -> float:
        return me_ppl(self.view, references) or math.nan

    @cached_property
    def before(self) -> Before:
        if self._before is not None:
            return self._before
        made = self.follow(prepare(self.view, [], self.scale.tokens))
        self.tell("what the base knows")
        known = self.known(old_facts(self.scale.old, self.scale.seed))
        return Before(made.texts, made.references, tuple(known), self.me_ppl(made.references))
