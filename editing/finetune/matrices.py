"""Adapters that change the entries of weights themselves: all of them, half of them, few of them.

ΔW [out, in] begins at zero, or is made of parameters such that it does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from editing.deltas import Effect
from editing.finetune.adapter import Adapter
from editing.models.view import ModelView


class Matrices(Adapter):
    """Full fine-tuning of linears: ΔW itself."""

    def __init__(self, view: ModelView, paths: Sequence[str]) -> None:
        super().__init__()
        self.paths = list(paths)
        self.weights = [view.weight(path) for path in paths]
        self.changes = nn.ParameterList(
            nn.Parameter(torch.zeros(weight.shape, device=view.device)) for weight in self.weights
        )

    def effects(self) -> dict[str, Effect]:
        return {p: Effect(dense=D) for p, D in zip(self.paths, self.matrices(), strict=True)}

    def matrices(self) -> list[Tensor]:
        """ΔW of each path."""
        return list(self.changes)


class HalfFineTuning(Matrices):
    """HFT (Hui et al., 2024, arXiv:2404.18466): in every round half of the matrices stand still.

    Of each layer's attention matrices two of four (or half of what there are), of the MLP's one or
    two of three, by turns, are drawn anew at every round; what was trained before stays.

    Args:
        rounds: in a run.
        groups: indices into ``paths`` of the matrices of one category in one layer.
    """

    def __init__(
        self,
        view: ModelView,
        paths: Sequence[str],
        groups: Sequence[Sequence[int]],
        rounds: int,
        seed: int,
    ) -> None:
        super().__init__(view, paths)
        self.groups, self.rounds, self.seed = groups, rounds, seed

    def after_backward(self, step: int, total: int) -> None:
        for place in self.frozen(step * self.rounds // max(total, 1)):
            self.changes[place].grad = None

    def frozen(self, round_: int) -> set[int]:
        """The matrices that stand still in a round."""
        source = torch.Generator().manual_seed(self.seed * 1_000_003 + round_)
        still: set[int] = set()
        for turn, group in enumerate(self.groups):
            count = (len(group) + (turn + round_) % 2) // 2
            order = torch.randperm(len(group), generator=source).tolist()
            still |= {group[i] for i in order[:count]}
        return still


class SmallWeights(Matrices):
    """SaRA (Hu et al., 2024, arXiv:2409.06633): the weights that matter least are trained.

    Those of |w| below a threshold, here the ``share`` smallest of each matrix; a nuclear norm keeps
    ΔW of low rank.
    """

    def __init__(
        self, view: ModelView, paths: Sequence[str], share: float, nuclear_weight: float
    ) -> None:
        super().__init__(view, paths)
        self.nuclear_weight = nuclear_weight
        self.masks = [_smallest(weight, share) for weight in self.weights]

    def matrices(self) -> list[Tensor]:
        return [D * mask for D, mask in zip(self.changes, self.masks, strict=True)]

    def penalty(self) -> Tensor | float:
        if self.nuclear_weight == 0:
            return 0.0
        norms = [torch.linalg.matrix_norm(D, "nuc") for D in self.matrices()]
        return self.nuclear_weight * torch.stack(norms).sum()

    def trainable(self) -> int:
        return sum(int(mask.sum()) for mask in self.masks)


class Grown(Matrices):
    """SpIEL (Ansell et al., 2024, arXiv:2401.16405): few entries, some of which move on the way.

    Every ``every`` steps the k entries of smallest |ΔW| are dropped (they go back to 0) and as many
    grow where the gradients, gathered over ``gathered`` steps before, add up to the most; k falls
    linearly from ``rate`` of all entries to none.
    """

    def __init__(
        self,
        view: ModelView,
        paths: Sequence[str],
        density: float,
        rate: float,
        every: int,
        gathered: int,
        seed: int,
    ) -> None:
        super().__init__(view, paths)
        self.rate, self.every, self.gathered = rate, every, gathered
        source = torch.Generator().manual_seed(seed)
        for place, weight in enumerate(self.weights):
            count = max(1, round(density * weight.numel()))
            chosen = torch.randperm(weight.numel(), generator=source)[:count]
            mask = torch.zeros(weight.numel(), dtype=torch.bool)
            mask[chosen] = True
            self.register_buffer(f"mask_{place}", mask.view(weight.shape).to(view.device))
            self.register_buffer(f"sum_{place}", torch.zeros(weight.shape, device=view.device))

    def matrices(self) -> list[Tensor]:
        return list(self.changes)

    def mask(self, place: int) -> Tensor:
        return self.get_buffer(f"mask_{place}")

    def after_backward(self, step: int, total: int) -> None:
        """Move entries where it is time to; entries that are not there have no gradient."""
        left = self.every - step % self.every
        for place, change in enumerate(self.changes):
            if change.grad is None:
                continue
            if left <= self.gathered:
                self.get_buffer(f"sum_{place}").add_(change.grad)
            if left == 1:
                self._move(place, self.rate * (1 - step / max(total, 1)))
            change.grad *= self.mask(place)

    @torch.no_grad()
    def after_step(self) -> None:
        """Momentum moves what was dropped: back to 0."""
        for place, change in enumerate(self.changes):
            change *= self.mask(place)

    @torch.no_grad()
    def _move(self, place: int, rate: float) -> None:
        change, mask = self.changes[place], self.mask(place)
        gathered = self.get_buffer(f"sum_{place}")
        count = min(round(rate * int(mask.sum())), int((~mask).sum()))
        if count:
            size = torch.where(mask, change.abs(), math.inf).flatten()
            dropped = size.topk(count, largest=False).indices
            promise = torch.where(mask, -1.0, gathered.abs()).flatten()
            grown = promise.topk(count).indices
            flat = mask.view(-1)
            flat[dropped], flat[grown] = False, True
            change.view(-1)[dropped] = 0
        gathered.zero_()

    def trainable(self) -> int:
        return sum(int(self.mask(place).sum()) for place in range(len(self.paths)))


class Masked(Matrices):
    """Mask tuning (Zhao et al., 2020, arXiv:2004.12406): which weights there are is trained.

    W' = W ⊙ (m > threshold); scores m begin at ``start``, above it, so that all weights are there,
    and get the gradient of the hard mask as it is (straight-through).
    """

    def __init__(
        self, view: ModelView, paths: Sequence[str], start: float = 0.02, threshold: float = 0.01
    ) -> None:
        super().__init__(view, paths)
        self.threshold = threshold
        with torch.no_grad():
            for scores in self.changes:
                scores.fill_(start)

    def matrices(self) -> list[Tensor]:
        found = []
        for scores, weight in zip(self.changes, self.weights, strict=True):
            hard = (scores > self.threshold).float()
            mask = hard + (scores - scores.detach())  # 0 exactly within the brackets
            found.append(weight.float() * (mask - 1))
        return found

    def steady(self) -> list[nn.Parameter]:
        return list(self.changes)


class Intrinsic(Matrices):
    """SAID (Aghajanyan et al., 2021, arXiv:2012.13255): all matrices move along one vector z.

    ΔW = λ_l · reshape(P z), where z [d] is shared by all layers, λ_l is a number for each layer and
    P a fixed random projection of each matrix, drawn from the seed and never stored: Fastfood's
    product H G Π H B in blocks, of signs B, Hadamard's matrix H, a permutation Π and Gaussians G
    whose length is 1 in each block, which takes the place of the scaling S.

    Args:
        layers: of each path.
    """

    def __init__(
        self, view: ModelView, paths: Sequence[str], layers: Sequence[int], d: int, seed: int
    ) -> None:
        super().__init__(view, paths)
        self.changes = nn.ParameterList()
        self.layers = list(layers)
        self.z = nn.Parameter(torch.zeros(d, device=view.device))
        self.by_layer = nn.Parameter(torch.ones(max(layers) + 1, device=view.device))
        self.seed = seed
        self.projections = [
            _Fastfood(d, weight.numel(), seed * 1_000_003 + place, view.device)
            for place, weight in enumerate(self.weights)
        ]

    def matrices(self) -> list[Tensor]:
        return [
            self.by_layer[layer] * projection.apply(self.z).view(weight.shape)
            for layer, projection, weight in zip(
                self.layers, self.projections, self.weights, strict=True
            )
        ]


class _Fastfood:
    """P z for z [d] -> [n], in blocks of the power of two from d on (Le et al., 2013)."""

    def __init__(self, d: int, n: int, seed: int, device: torch.device) -> None:
        source = torch.Generator().manual_seed(seed)
        self.n, self.size = n, 1 << max(0, d - 1).bit_length()
        blocks = -(-n // self.size)
        shape = (blocks, self.size)
        self.signs = (torch.randint(0, 2, shape, generator=source) * 2.0 - 1).to(device)
        self.order = torch.stack(
            [torch.randperm(self.size, generator=source) for _ in range(blocks)]
        ).to(device)
        self.gauss = torch.randn(shape, generator=source).to(device)
        self.gauss /= self.gauss.square().sum(1, keepdim=True).sqrt()

    def apply(self, z: Tensor) -> Tensor:
        x = torch.nn.functional.pad(z, (0, self.size - len(z))) * self.signs
        x = _hadamard(x).gather(1, self.order) * self.gauss
        return _hadamard(x).flatten()[: self.n] / math.sqrt(self.n)


def _hadamard(x: Tensor) -> Tensor:
    """The Walsh-Hadamard transform of the last dimension, a power of two."""
    size, width = x.shape[-1], 1
    while width < size:
        pairs = x.view(*x.shape[:-1], size // (2 * width), 2, width)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        width *= 2
    return x


def _smallest(weight: Tensor, share: float) -> Tensor:
    """1 for the ``share`` of the entries of smallest size, else 0."""
    count = max(1, round(share * weight.numel()))
    mask = torch.zeros(weight.numel(), device=weight.device)
    mask[weight.float().abs().flatten().topk(count, largest=False).indices] = 1
    return mask.view(weight.shape)
