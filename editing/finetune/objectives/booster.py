"""Booster (Huang et al., 2024, arXiv:2409.01586): what is harmful becomes hard to learn later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from editing.finetune.objectives.objective import Objective, Tuned
from editing.finetune.objectives.supervised import Supervised
from editing.finetune.rows import TrainingRow
from editing.models.view import ModelView

SUPERVISED = Supervised()


@dataclass(frozen=True)
class Booster(Objective[TrainingRow]):
    """Supervised tuning, regularised by how much a step towards harm would lower the harmful loss.

    Of L_align + λ (L_harm(w) − L_harm(w − α g_h / ‖g_h‖)) the gradient is, second derivatives left
    out as in the paper, g = ∇L_align + λ (g_h − g_h') with g_h = ∇L_harm(w) and
    g_h' = ∇L_harm(w − α g_h / ‖g_h‖). w are the adapter's parameters, ‖·‖ is the norm of all of
    them together; each step draws as many harmful rows as its batch has.

    Attributes:
        harmful: the rows of L_harm.
        weight: λ.
        alpha: α.
    """

    harmful: Sequence[TrainingRow]
    weight: float = 5.0
    alpha: float = 0.1

    def row(self, view: ModelView, example: Mapping[str, Any]) -> TrainingRow:
        return SUPERVISED.row(view, example)

    def others(self) -> Sequence[TrainingRow]:
        return self.harmful

    def backward(self, tuned: Tuned, rows: Sequence[TrainingRow], seed: int) -> dict[str, float]:
        tuned = replace(tuned, held=None)  # the parameters move, and their gradients are looked at
        told = SUPERVISED.backward(tuned, rows, seed)
        source = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.harmful), generator=source).tolist()
        batch = [self.harmful[place] for place in order[: len(rows)]]

        parameters = [p for p in tuned.adapter.parameters() if p.grad is not None]
        aligned = _taken(parameters)
        before = SUPERVISED.backward(tuned, batch, seed)
        g_h = _taken(parameters)
        own = [p.data for p in parameters]
        _step(parameters, g_h, self.alpha)
        after = SUPERVISED.backward(tuned, batch, seed)
        g_h_after = _taken(parameters)
        for p, value, g, h, h_after in zip(parameters, own, aligned, g_h, g_h_after, strict=True):
            p.data = value
            p.grad = g + self.weight * (h - h_after)
        return {
            **told,
            "harmful_loss": before["train_loss"],
            "harmful_loss_perturbed": after["train_loss"],
        }

    def measure(self, tuned: Tuned, rows: Sequence[TrainingRow]) -> dict[str, float]:
        return SUPERVISED.measure(tuned, rows)


def _taken(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, which are no longer the parameters'."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return found


@torch.no_grad()
def _step(parameters: Sequence[Tensor], gradients: Sequence[Tensor], length: float) -> None:
    """Move against the gradients by so much in all; not at all where they are zero.

    Each gets a new tensor of numbers, and its own is not written: gradients are yet to go through
    what was computed of it (``Tuned.holding``).
    """
    norm = torch.stack([g.norm() for g in gradients]).norm()
    if norm > 0:
        for p, g in zip(parameters, gradients, strict=True):
            p.data = p.data - g * (length / norm)
