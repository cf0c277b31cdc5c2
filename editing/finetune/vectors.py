"""Adapters of a few numbers for each output: scales and shifts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from editing.deltas import Effect
from editing.finetune.adapter import Adapter, width
from editing.models.view import ModelView


class ScaleShift(Adapter):
    """SSF (Lian et al., 2022, arXiv:2210.08823): y' = γ ⊙ y + β after every operation.

    On norms alone it is the tuning of norms: a norm's weight and bias are a scale and a shift.
    """

    def __init__(self, view: ModelView, paths: Sequence[str]) -> None:
        super().__init__()
        self.paths = list(paths)
        widths = [width(view, path) for path in paths]
        self.scales = nn.ParameterList(torch.ones(n, device=view.device) for n in widths)
        self.shifts = nn.ParameterList(torch.zeros(n, device=view.device) for n in widths)

    def effects(self) -> dict[str, Effect]:
        return {
            path: Effect(scale=scale, shift=shift)
            for path, scale, shift in zip(self.paths, self.scales, self.shifts, strict=True)
        }

    def steady(self) -> list[nn.Parameter]:
        return list(self.scales)


class HeadOffsets(Adapter):
    """LoFiT (Yin et al., 2024, arXiv:2406.01563): offsets of few attention heads' outputs.

    In the first part of a run scales A of all heads are trained under an L1 penalty, h -> (1 + A)h;
    the ``share`` of heads with the longest A are chosen, A is thrown away, and in the rest only
    offsets v of those are trained, h -> h + v. Through the output projection an offset of a head
    is a shift, W_o v.

    Args:
        paths: of the attentions' output projections.
        heads: how many an attention has.
        share: of all heads.
        finding: share of the run that finds them.
        l1: weight of the penalty.
    """

    def __init__(
        self,
        view: ModelView,
        paths: Sequence[str],
        heads: int,
        share: float,
        finding: float,
        l1: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.paths, self.heads = list(paths), heads
        self.share, self.finding, self.l1 = share, finding, l1
        self.outputs = [view.weight(path).float() for path in paths]
        source = torch.Generator().manual_seed(seed)
        inside = self.outputs[0].shape[1]
        start = torch.randn(len(paths), inside, generator=source) * 1e-3
        self.scales = nn.Parameter(start.to(view.device))
        self.offsets = nn.Parameter(torch.zeros(len(paths), inside, device=view.device))
        self.register_buffer("chosen", torch.zeros(len(paths), heads, device=view.device))
        self.register_buffer("is_found", torch.zeros((), device=view.device))

    def effects(self) -> dict[str, Effect]:
        if not self.is_found:
            return {
                path: Effect(dense=W * scale)
                for path, W, scale in zip(self.paths, self.outputs, self.scales, strict=True)
            }
        mask = self.get_buffer("chosen").repeat_interleave(self.scales.shape[1] // self.heads, 1)
        return {
            path: Effect(shift=W @ offset)
            for path, W, offset, own in zip(
                self.paths, self.outputs, self.offsets * mask, mask, strict=True
            )
            if own.any()
        }

    def penalty(self) -> Tensor | float:
        return 0.0 if self.is_found else self.l1 * self.scales.abs().sum()

    @torch.no_grad()
    def before_step(self, step: int, total: int) -> None:
        if self.is_found or step < self.finding * total:
            return
        lengths = self.scales.view(len(self.paths), self.heads, -1).norm(dim=-1)
        count = max(1, round(self.share * lengths.numel()))
        chosen = self.get_buffer("chosen")
        chosen.view(-1)[lengths.flatten().topk(count).indices] = 1
        self.get_buffer("is_found").fill_(1)
