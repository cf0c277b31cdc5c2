"""What the version says of ordinary texts is kept while it learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from editing.finetune.objectives.objective import Objective, Tuned, learnt
from editing.finetune.rows import R, Sized, TrainingRow, chunks
from editing.models.packing import packed
from editing.models.view import ModelView


@dataclass(frozen=True)
class Keeping(Objective[R], Generic[R]):
    """Another objective, and a divergence from the version on texts that it would write.

    To the loss comes weight · KL(π_ref ‖ π), the mean over every token of as many of the texts as
    a step draws (learning without forgetting, arXiv:1606.09282, at the output of a language
    model). The reference π_ref is the version that is tuned, without the adapter.

    Attributes:
        aim: the other objective.
        texts: as token ids, of two tokens at least.
        weight: of the divergence.
        count: texts of one step.
    """

    aim: Objective[R]
    texts: Sequence[TrainingRow]
    weight: float
    count: int

    def row(self, view: ModelView, example: Mapping[str, Any]) -> R:
        return self.aim.row(view, example)

    def rows(self, view: ModelView, examples: Sequence[Mapping[str, Any]]) -> list[R]:
        return self.aim.rows(view, examples)

    def others(self) -> Sequence[Sized]:
        return self.aim.others()

    def backward(self, tuned: Tuned, rows: Sequence[R], seed: int) -> dict[str, float]:
        told = self.aim.backward(tuned, rows, seed)
        source = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(self.texts), (self.count,), generator=source).tolist()
        texts = [_cut(self.texts[place], tuned.kept) for place in drawn]
        count = sum(text.targets for text in texts)
        total = 0.0
        for chunk in chunks(texts, min(tuned.tokens, tuned.kept)):
            before = _reference(tuned.view, chunk)
            with tuned.active():
                after = learnt(tuned.view, chunk)[0].log_softmax(-1)
                divergence = kl_div(after, before, reduction="sum", log_target=True) / count
                torch.autograd.backward(self.weight * divergence)
            total += divergence.item()
        return {**told, "kept_kl": total}

    def measure(self, tuned: Tuned, rows: Sequence[R]) -> dict[str, float]:
        return self.aim.measure(tuned, rows)


@torch.no_grad()
def _reference(view: ModelView, texts: Sequence[TrainingRow]) -> Tensor:
    """log π_ref of every token that is predicted [n, vocabulary]."""
    with packed(view):
        return learnt(view, texts)[0].log_softmax(-1)


def _cut(text: TrainingRow, tokens: int) -> TrainingRow:
    """Without what is beyond so many tokens."""
    return text if text.size <= tokens else TrainingRow(text.ids[:tokens], range(1, tokens))


def ordinary(view: ModelView, texts: Sequence[str]) -> list[TrainingRow]:
    """Texts of which every token is looked at, cut to the base's context."""
    encoded = [view.excerpt(text) for text in texts]
    return [TrainingRow(ids, range(1, len(ids))) for ids in encoded if len(ids) > 1]
