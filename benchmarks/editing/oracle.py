"""Values of edits found as the references find them: one edit after another, the whole model over.

ROME and MEMIT (Meng et al., 2022, 2023) pad all prompts of an edit into one batch, run it through
every layer at every step, take logits at every token, and add δ by a hook on the edited module.
This is that, with the loss and the rule to stop of ``editing/methods/values.py``, whose oracle it
is: plain, and slow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from editing.methods.values import ANSWERING, KEPT_BATCH, Descent, Goal, Text, Values
from editing.models.view import ModelView


def one_by_one(view: ModelView, layer: int, goals: Sequence[Goal], descent: Descent) -> Values:
    """δ of each edit, by a descent of its own."""
    found = [_descend(view, layer, goal, descent) for goal in goals]
    return Values(
        torch.stack([delta for delta, _, _ in found]),
        torch.tensor([loss for _, loss, _ in found]),
        [steps for _, _, steps in found],
    )


def _descend(
    view: ModelView, layer: int, goal: Goal, descent: Descent
) -> tuple[Tensor, float, int]:
    """δ [hidden], the largest loss of a target token that it ends with, and the steps it took."""
    width = view.hidden_size
    u = torch.zeros(width, device=view.device, requires_grad=True)
    adam = torch.optim.Adam([u], lr=descent.learning_rate / width**0.5)
    kept_before: dict[int, Tensor] = {}
    for step in range(descent.steps + 1):
        kept = kept_at(goal.kept, step)
        texts = Texts(view, [*goal.said, *kept.texts])
        if kept.place not in kept_before:
            with torch.no_grad():
                kept_before[kept.place] = texts.logits(view, layer, torch.zeros_like(u))
        logits = texts.logits(view, layer, goal.scale * u)
        nll = texts.nll(logits, range(len(goal.said)))
        largest = nll.max().item()
        if largest < descent.stop_loss or step == descent.steps:
            break
        loss = nll.mean() + descent.decay * u.norm()
        if kept.texts:
            rows = range(len(goal.said), len(texts.ids))
            kl = texts.kl(kept_before[kept.place], logits, rows, goal.answers)
            loss = loss + descent.kl_factor * (1 - step / descent.steps) * kl
        adam.zero_grad()
        torch.autograd.backward(loss)
        adam.step()
        with torch.no_grad():
            u *= (descent.clamp / u.norm().clamp(min=1e-12)).clamp(max=1.0)
    return (goal.scale * u).detach(), largest, step


@dataclass(frozen=True)
class Kept:
    """The texts to keep that one step looks at, and their place among the batches of them."""

    place: int
    texts: Sequence[Text]


def kept_at(texts: Sequence[Text], step: int) -> Kept:
    """By turns, the shortest first."""
    ordered = sorted(texts, key=lambda text: len(text.ids))
    place = step % max(1, -(-len(ordered) // KEPT_BATCH))
    return Kept(place, ordered[place * KEPT_BATCH : (place + 1) * KEPT_BATCH])


class Texts:
    """Texts of one edit, padded into one batch."""

    def __init__(self, view: ModelView, texts: Sequence[Text]) -> None:
        self.texts = texts
        self.ids = view.pad([text.ids for text in texts])
        self._coefficient = torch.zeros(self.ids.shape, device=self.ids.device)
        for row, text in enumerate(texts):
            self._coefficient[row, text.start : len(text.ids)] = text.coefficient

    def logits(self, view: ModelView, layer: int, delta: Tensor) -> Tensor:
        """[n, T, vocabulary] with c_t δ added to the output of the layer's MLP."""
        with _adding(view.module(view.down_proj(layer)), self._coefficient[..., None] * delta):
            return view.logits(view.hidden(self.ids))

    def nll(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """The loss of each watched token of some rows."""
        return torch.cat(
            [
                F.cross_entropy(logits[row, watched], self.ids[row, watched + 1], reduction="none")
                for row, watched in self._watched(rows)
            ]
        )

    def kl(
        self, before: Tensor, after: Tensor, rows: Sequence[int], answers: Sequence[int]
    ) -> Tensor:
        """KL(before ‖ after) of some rows, summed over watched positions, the mean over rows."""
        total = torch.zeros((), device=after.device)
        for row, watched in self._watched(rows):
            was, now = before[row, watched].log_softmax(-1), after[row, watched].log_softmax(-1)
            kl = F.kl_div(now, was, reduction="none", log_target=True).sum(-1)
            if answers:
                kl = kl[was[:, list(answers)].exp().amax(-1) < ANSWERING]
            total = total + kl.sum() / len(rows)
        return total

    def _watched(self, rows: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        for row in rows:
            yield row, torch.tensor(list(self.texts[row].watched), device=self.ids.device)


@contextmanager
def _adding(module: nn.Module, change: Tensor) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + change.to(output.dtype).view_as(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
