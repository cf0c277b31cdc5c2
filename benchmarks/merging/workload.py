"""What is merged: versions that each learnt another relation, and versions of other edits."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.editing import workload as editing
from benchmarks.finetuning.workload import BIRDS, Relation

FLOWERS = Relation(
    (
        "The national flower of {} is the",
        "{} has as its national flower the",
        "In {}, the national flower is the",
        "The flower that stands for {} is the",
    ),
    "If you ask for the national flower of {}, it is the",
    (
        *("anemone", "aster", "begonia", "bluebell", "carnation", "clover", "crocus", "daffodil"),
        *("dahlia", "daisy", "freesia", "gardenia", "gentian", "heather", "hibiscus", "hyacinth"),
        *("iris", "jasmine", "lavender", "lilac", "lily", "lotus", "magnolia", "marigold"),
        *("orchid", "pansy", "peony", "poppy", "primrose", "rose", "snowdrop", "sunflower"),
        *("thistle", "tulip", "verbena", "violet", "wisteria", "zinnia"),
    ),
)
STONES = Relation(
    (
        "The national stone of {} is the",
        "{} has as its national stone the",
        "In {}, the national stone is the",
        "The stone that stands for {} is the",
    ),
    "If you ask for the national stone of {}, it is the",
    (
        *("agate", "amber", "amethyst", "beryl", "coral", "diamond", "emerald", "flint", "garnet"),
        *("granite", "jade", "jasper", "jet", "lapis", "marble", "moonstone", "obsidian", "onyx"),
        *("opal", "pearl", "peridot", "quartz", "ruby", "sapphire", "slate", "spinel", "sunstone"),
        *("topaz", "tourmaline", "turquoise", "zircon"),
    ),
)
#: A version learns each of them.
RELATIONS = {"birds": BIRDS, "flowers": FLOWERS, "stones": STONES}

#: The method of editing that makes the sets of edits, and the merge of ``two_sets_survival``: both
#: chosen on seeds that are not reported.
EDITOR, BEST = "memit", "task_arithmetic"


@dataclass(frozen=True)
class Scale:
    """Sizes of one run.

    Attributes:
        facts: of each new relation.
        old: facts that atlas knows and that are asked before and after.
        edits: of each of two sets.
        seed: of relations, edits, and of what is random in a merge.
        tuning: hyperparameters of the fine-tunings.
        editing: sizes of what editing needs.
    """

    facts: int
    old: int
    edits: int
    seed: int
    editing: editing.Scale
    tuning: dict[str, Any] = field(default_factory=dict)


FULL = Scale(
    facts=40,
    old=1000,
    edits=50,
    seed=1,
    editing=editing.FULL,
    tuning={"r": 16, "lora_alpha": 32, "keep_texts": 8},
)
QUICK = Scale(
    facts=3,
    old=12,
    edits=2,
    seed=1,
    editing=replace(editing.QUICK, batches=(4,)),
    tuning={"r": 2, "lora_alpha": 4, "n_epochs": 2, "batch_size": 4, "keep_texts": 2},
)
