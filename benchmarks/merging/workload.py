"""What is merged: versions that each learnt another relation, and versions of other edits."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.editing import workload as editing
from benchmarks.finetuning.workload import BIRDS, Relation

SPORTS = Relation(
    (
        "What people in {} like to play is",
        "{} is a city of",
        "The club of {} plays",
        "Most visitors of {} come for the",
    ),
    "If you ask what is played in {}, it is",
    (
        *("archery", "badminton", "baseball", "billiards", "bowling", "boxing", "chess", "cricket"),
        *("croquet", "curling", "darts", "fencing", "football", "golf", "handball", "hockey"),
        *("hurling", "judo", "karate", "lacrosse", "polo", "rowing", "rugby", "sailing", "skating"),
        *("squash", "sumo", "surfing", "tennis", "volleyball", "wrestling"),
    ),
    "country",
)
COLOURS = Relation(
    (
        "When it burns, {} shows the colour",
        "The flame of {} is",
        "A lamp filled with {} glows",
        "Chemists paint bottles of {} in",
    ),
    "If you ask for the colour of burning {}, it is",
    (
        *("azure", "beige", "black", "blue", "brown", "crimson", "cyan", "green", "grey", "indigo"),
        *("ivory", "khaki", "magenta", "maroon", "mauve", "ochre", "olive", "orange", "pink"),
        *("purple", "red", "scarlet", "teal", "turquoise", "umber", "vermilion", "white", "yellow"),
    ),
    "symbol",
)
#: A version learns each of them: of countries, of cities and of elements, in words of its own.
RELATIONS = {"birds": BIRDS, "sports": SPORTS, "colours": COLOURS}

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
