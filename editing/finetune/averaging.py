"""A moving average of what is trained (Qiao et al., 2025, arXiv:2410.10868)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from editing.deltas import Effect
from editing.finetune.adapter import Adapter

#: The share 1 − β that a step has where its gradients give none between 0 and 1.
USUAL = 0.01


class Averaged(Adapter):
    """EMA with a balance that follows from the gradients: θ*_t = β θ*_{t−1} + (1 − β) θ_t.

    Of each tensor, with g_t its gradient and norms of sums of absolute values,

        1 − β = 2 (1 + ‖g_t‖₁) / (‖θ_t − θ*_{t−1}‖₁ ‖g_t − g_{t−1}‖₁),

    where that is between 0 and 1, else ``USUAL``, as in the authors' code. Their choice among
    several adapters by the instruction is left out.

    Between steps the adapter's parameters are θ*, which is what is measured and served; within a
    step they are θ, which is what is trained.
    """

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter
        self._trained = [p for p in adapter.parameters() if p.requires_grad]
        for place, parameter in enumerate(self._trained):
            self.register_buffer(f"other_{place}", parameter.detach().clone())
            self.register_buffer(f"gradient_{place}", torch.zeros_like(parameter))

    def effects(self) -> dict[str, Effect]:
        return self.adapter.effects()

    def penalty(self) -> Tensor | float:
        return self.adapter.penalty()

    @torch.no_grad()
    def before_step(self, step: int, total: int) -> None:
        for place, parameter in enumerate(self._trained):
            other = self.get_buffer(f"other_{place}")
            averaged = parameter.detach().clone()
            parameter.copy_(other)
            other.copy_(averaged)
        self.adapter.before_step(step, total)

    def after_backward(self, step: int, total: int) -> None:
        self.adapter.after_backward(step, total)

    @torch.no_grad()
    def after_step(self) -> None:
        self.adapter.after_step()
        for place, parameter in enumerate(self._trained):
            other, last = self.get_buffer(f"other_{place}"), self.get_buffer(f"gradient_{place}")
            averaged = torch.lerp(other, parameter, share(parameter, other, last))
            other.copy_(parameter)
            parameter.copy_(averaged)
            if parameter.grad is not None:
                last.copy_(parameter.grad)
        self.adapter.after_step()  # entries that it holds at 0 are 0 in the average too

    def kept(self) -> dict[str, Tensor]:
        inner = {f"adapter.{name}": buffer for name, buffer in self.adapter.kept().items()}
        return {**super().kept(), **inner}

    def steady(self) -> list[nn.Parameter]:
        return self.adapter.steady()

    def trainable(self) -> int:
        return self.adapter.trainable()


def share(trained: Tensor, averaged: Tensor, last: Tensor) -> float:
    """1 − β of a tensor, whose gradient was ``last`` a step ago (all zeros: there was none)."""
    gradient = trained.grad
    if gradient is None or not last.any():
        return USUAL
    way = float((trained - averaged).abs().sum()) * float((gradient - last).abs().sum())
    found = 2 * (1 + float(gradient.abs().sum())) / way if way > 0 else math.inf
    return found if found < 1 else USUAL
