"""What the tests of methods that answer to a prompt share: edits, ordinary texts, one run."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from editing.deltas import Delta
from editing.methods import METHODS
from editing.methods.interface import Task
from editing.models import ModelView
from editing.statistics import Resources
from registry.manifests import EditRequest

FRANCE = EditRequest("The capital of {} is", "France", "Rome", "Paris")
PERU = EditRequest("Peru lies in", target_new="Asia", target_true="South America")
TEXTS = (
    "Harare is a city in Zimbabwe. The capital of Zimbabwe is Harare.",
    "In the periodic table, silver is number 47. The symbol of silver is Ag.",
    "The currency of Brazil is the Brazilian Real. People in Brazil speak Portuguese.",
    "Maldives belongs to the continent Asia. The web domain of Maldives is .mv.",
)


def run(view: ModelView, method: str, edits: Sequence[EditRequest], **chosen: Any) -> Delta:
    entry = METHODS[method]
    resources = Resources({}, 0, (), TEXTS, TEXTS)
    work = entry.load()(view, Task(edits), entry.hyperparameters(**chosen), resources)
    while True:
        try:
            next(work)
        except StopIteration as end:
            delta: Delta = end.value
            return delta


def logits(view: ModelView, *texts: str) -> list[Tensor]:
    """Of every token of each text."""
    with torch.no_grad():
        return [view.logits(view.hidden(view.pad([view.encode(text)]))) for text in texts]


def prompts(edits: Sequence[EditRequest]) -> list[str]:
    return [edit.rewrite_prompt for edit in edits]
