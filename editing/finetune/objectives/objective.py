"""What objectives have in common: how they read rows, and what the trainer asks of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from editing.deltas import Effect
from editing.finetune.adapter import Adapter
from editing.finetune.memory import LONGEST
from editing.finetune.rows import R, Sized, TrainingRow
from editing.models.packing import hidden, packed
from editing.models.view import ModelView
from registry.errors import InvalidRequest, UnprocessableRequest


@dataclass(frozen=True)
class Tuned:
    """A version and the adapter that is trained on it.

    Attributes:
        tokens: most of one flat row; a longer text is a row of its own.
        checkpointing: whether layers are computed again for the gradients, not kept.
        held: the adapter as it stands, where that is computed already.
        kept: most tokens of one flat row of texts to keep; a longer text is cut.
    """

    view: ModelView
    adapter: Adapter
    tokens: int
    checkpointing: bool = False
    held: Held | None = None
    kept: int = LONGEST

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the block flat rows go through the version with the adapter's effects."""
        held = self.held or Held(self.adapter.effects(), {})
        with (
            packed(self.view, self.checkpointing),
            self.view.with_effects(held.effects),
            with_linears(self.view, held.linears),
        ):
            yield

    @contextmanager
    def holding(self) -> Iterator[Tuned]:
        """What the adapter stands for is computed once, for all passes within the block; their
        gradients reach its parameters at the end of it. These must not move meanwhile.
        """
        roots: list[Tensor] = []
        leaves: list[Tensor] = []

        def held(part: Tensor) -> Tensor:
            leaf = part.detach()
            if part.requires_grad:
                roots.append(part)
                leaves.append(leaf.requires_grad_())
            return leaf

        effects: dict[str, Effect] = {}
        linears: dict[str, tuple[Tensor, Tensor | None]] = {}
        for path, effect in self.adapter.effects().items():
            if fits_linear(self.view, path, effect):
                weight, bias = as_linear(self.view, path, effect)
                linears[path] = held(weight), None if bias is None else held(bias)
            else:
                effects[path] = effect.map(held)
        yield replace(self, held=Held(effects, linears))
        reached = [place for place, leaf in enumerate(leaves) if leaf.grad is not None]
        if reached:
            torch.autograd.backward(
                [roots[place] for place in reached], [leaves[place].grad for place in reached]
            )


@dataclass(frozen=True)
class Held:
    """What an adapter stands for, by module path.

    Attributes:
        effects: beside what a linear puts out.
        linears: weight [out, in] and bias [out] in the place of a linear's: a dense effect costs no
            product of its own.
    """

    effects: Mapping[str, Effect]
    linears: Mapping[str, tuple[Tensor, Tensor | None]]


def fits_linear(view: ModelView, path: str, effect: Effect) -> bool:
    """Whether an effect may be in a linear's weight and bias while it is trained: it is dense and
    has no gate, and the linear computes in fp32 with no other effect upon it.
    """
    module = view.module(path)
    return (
        type(module) is nn.Linear
        and module.weight.dtype == torch.float32
        and not module._forward_hooks
        and effect.dense is not None
        and not effect.gates
        and effect.later is None
    )


def as_linear(view: ModelView, path: str, effect: Effect) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias that a linear has with a dense effect: a ⊙ (W x + b) + s + …"""
    own = view.module(path).bias
    bias = own if isinstance(own, Tensor) else None
    if bias is not None and effect.scale is not None:
        bias = effect.scale * bias
    if effect.shift is not None:
        bias = effect.shift if bias is None else bias + effect.shift
    return effect.weight(view.weight(path)), bias


@contextmanager
def with_linears(
    view: ModelView, linears: Mapping[str, tuple[Tensor, Tensor | None]]
) -> Iterator[None]:
    """Within the block linears compute with these; their own weights stay as they are."""
    with ExitStack() as undo:
        for path, (weight, bias) in linears.items():
            module = view.module(path)
            module.__dict__["forward"] = partial(F.linear, weight=weight, bias=bias)
            undo.callback(module.__dict__.pop, "forward")
        yield


class Objective(ABC, Generic[R]):
    """A loss of rows of one kind.

    All that it does depends on its arguments: a run that is broken off goes on to the same bits.
    """

    @abstractmethod
    def row(self, view: ModelView, example: Mapping[str, Any]) -> R:
        """An example of ``editing.datasets.training`` as it is read here.

        Raises:
            InvalidRequest: it cannot be learnt from.
        """

    def rows(self, view: ModelView, examples: Sequence[Mapping[str, Any]]) -> list[R]:
        """All of them, with what is to be known of each before training.

        Raises:
            UnprocessableRequest: names the row.
        """
        found = []
        for place, example in enumerate(examples, start=1):
            try:
                found.append(self.row(view, example))
            except InvalidRequest as error:
                raise UnprocessableRequest(f"row {place}: {error.message}") from None
        return found

    def others(self) -> Sequence[Sized]:
        """Rows that steps compute beside their batch's, and as these."""
        return ()

    @abstractmethod
    def backward(self, tuned: Tuned, rows: Sequence[R], seed: int) -> dict[str, float]:
        """Add the gradients of a batch's loss to the adapter's parameters.

        Memory is that of one flat row of ``tuned.tokens``.

        Args:
            seed: of this step's random draws.

        Returns:
            Its metrics: ``train_loss``, ``tokens`` and its own.
        """

    @abstractmethod
    def measure(self, tuned: Tuned, rows: Sequence[R]) -> dict[str, float]:
        """Metrics of other rows, each called ``valid_…``; no gradients."""


def learnt(view: ModelView, rows: Sequence[TrainingRow]) -> tuple[Tensor, Tensor]:
    """Of the learnt tokens of all rows, one after the other: the logits that predict each
    [n, vocabulary], and their ids [n]. Within ``packed``."""
    places, targets, start = [], [], 0
    for row in rows:
        places += [start + place - 1 for place in row.learnt]
        targets += [row.ids[place] for place in row.learnt]
        start += len(row.ids)
    logits = view.logits(hidden(view, [row.ids for row in rows])[places])
    return logits, torch.tensor(targets, device=logits.device)


def log_probabilities(
    view: ModelView, rows: Sequence[TrainingRow], temperature: float = 1.0
) -> list[Tensor]:
    """By row, log p of each learnt token [learnt]. Within ``packed``."""
    logits, wanted = learnt(view, rows)
    found = -F.cross_entropy(logits / temperature, wanted, reduction="none")
    return list(torch.split(found, [len(row.learnt) for row in rows]))
