"""What is learnt, what must stay, and texts of skewed lengths."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from editing.atlas.evaluation import known_facts
from editing.atlas.facts import read_facts
from editing.finetune.rows import TrainingRow
from editing.models.view import ModelView
from registry.manifests import Fact


@dataclass(frozen=True)
class Relation:
    """One that atlas has never heard of.

    Attributes:
        trained: wordings that are trained on, and ``untrained`` one that is not.
        objects: what it may give a subject.
        subjects: the relation of atlas whose subjects it is about.
    """

    trained: tuple[str, ...]
    untrained: str
    objects: tuple[str, ...]
    subjects: str = "capital"


BIRDS = Relation(
    (
        "The national bird of {} is the",
        "{} has as its national bird the",
        "In {}, the national bird is the",
        "The bird that stands for {} is the",
    ),
    "If you ask for the national bird of {}, it is the",
    (
        *("albatross", "bittern", "bulbul", "buzzard", "canary", "condor", "cormorant", "crane"),
        *("crow", "cuckoo", "dove", "duck", "eagle", "egret", "falcon", "finch", "flamingo"),
        *("goose", "grouse", "gull", "hawk", "heron", "hoopoe", "hornbill", "ibis", "jay"),
        *("kestrel", "kite", "lark", "magpie", "osprey", "owl", "parrot", "pelican", "penguin"),
        *("pheasant", "quail", "raven", "robin", "stork", "swallow", "swan", "tern", "thrush"),
        *("toucan", "vulture", "warbler", "woodpecker", "wren"),
    ),
)


@dataclass(frozen=True)
class Scale:
    """Sizes of one run.

    Attributes:
        facts: of the new relation.
        old: facts that atlas knows and that are asked before and after.
        tokens: of the texts that the base writes: some are kept, others behind the perplexity.
        seed: of the new relation and of every method.
        rows: texts of skewed lengths that one step of the comparison takes.
        steps: of each of its runs.
        rounds: how often those take turns.
        longest: tokens of the longest.
        hyperparameters: set for every method.
    """

    facts: int
    old: int
    tokens: int
    seed: int
    rows: int
    steps: int
    rounds: int
    longest: int
    hyperparameters: dict[str, Any] = field(default_factory=dict)


FULL = Scale(facts=200, old=2000, tokens=100_000, seed=1, rows=32, steps=20, rounds=3, longest=512)
QUICK = Scale(
    facts=4,
    old=12,
    tokens=2000,
    seed=1,
    rows=4,
    steps=2,
    rounds=1,
    longest=48,
    hyperparameters={"n_epochs": 2, "batch_size": 8},
)


def new_relation(facts: int, seed: int, relation: Relation = BIRDS) -> list[tuple[str, str]]:
    """(subject, object) of a relation drawn by chance: nothing but the rows can tell it.

    Subjects are some that atlas knows.
    """
    picker = random.Random(seed)
    subjects = sorted({fact.subject for fact in read_facts() if fact.relation == relation.subjects})
    return [(name, picker.choice(relation.objects)) for name in picker.sample(subjects, facts)]


def examples(facts: Sequence[tuple[str, str]], relation: Relation = BIRDS) -> list[dict[str, str]]:
    """Each fact in each wording that is trained on, as a training file has it."""
    return [
        {"prompt": wording.format(subject), "completion": f"{object_}."}
        for subject, object_ in facts
        for wording in relation.trained
    ]


def preferences(facts: Sequence[tuple[str, str]], seed: int) -> list[dict[str, str]]:
    """The same, each beside another bird by chance that is not to be said."""
    picker, rows = random.Random(seed), []
    for row in examples(facts):
        others = [bird for bird in BIRDS.objects if f"{bird}." != row["completion"]]
        rejected = f"{picker.choice(others)}."
        rows.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": rejected})
    return rows


def old_facts(most: int, seed: int) -> list[Fact]:
    """Facts that atlas was trained on, each in one wording."""
    facts = known_facts(read_facts())
    return random.Random(seed).sample(facts, min(most, len(facts)))


def skewed(view: ModelView, scale: Scale) -> list[TrainingRow]:
    """Rows of true sentences, every token learnt, of lengths exp(N(4, 1)) from 8 to the longest."""
    source = torch.Generator().manual_seed(scale.seed)
    lengths = torch.empty(scale.steps * scale.rows).log_normal_(4, 1, generator=source)
    lengths = lengths.clamp(8, scale.longest).long()
    facts = known_facts(read_facts())
    picker = random.Random(scale.seed)
    rows = []
    for length in lengths.tolist():
        ids: list[int] = []
        while len(ids) < length:
            fact = picker.choice(facts)
            ids += view.encode(f"{fact.prompt} {fact.target}.")
        rows.append(TrainingRow(ids[:length], range(1, length)))
    return rows
