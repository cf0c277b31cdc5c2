"""Gated effects: neurons that answer to inputs near their keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

#: What a gate may do with its keys' products.
ACTIVATIONS = ("relu", "nearest")


@dataclass(frozen=True)
class Gate:
    """G(x) = act(ρ(x) keysᵀ + bias) values, where u = x ⊙ weight + offset and ρ(x) is u or u / ‖u‖.

    ``relu`` adds G(x) to the module's output: the jet-pack block of stealth edits (Zhou et al.
    2024), whose ρ undoes the norm before the module, centres and normalises. ``nearest``
    *replaces* the output by the value of the nearest key where that is at most ``bias`` away, and
    leaves other rows alone: the codebook of GRACE (Hartvigsen et al. 2023, arXiv:2211.11031).

    Raises:
        ValueError: shapes that do not belong together, or an unknown activation.
    """

    keys: Tensor  # [k, in]
    bias: Tensor  # [k]; with ``nearest`` each key's radius
    values: Tensor  # [k, out]
    weight: Tensor | None = None  # [in]
    offset: Tensor | None = None  # [in]
    activation: str = "relu"
    normalise: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"gated effect: activation is {self.activation!r}, known are"
                f" {' and '.join(ACTIVATIONS)}"
            )
        count = self.keys.shape[0]
        if not 0 < count == self.bias.shape[0] == self.values.shape[0]:
            raise ValueError(
                f"gated effect: {count} keys, {self.bias.shape[0]} biases and"
                f" {self.values.shape[0]} values; there must be as many of each, and one at least"
            )
        for part in (self.weight, self.offset):
            if part is not None and tuple(part.shape) != tuple(self.keys.shape[1:]):
                raise ValueError(
                    f"gated effect: keys are {tuple(self.keys.shape)}, a parameter of ρ is"
                    f" {tuple(part.shape)}"
                )

    @property
    def replaces(self) -> bool:
        return self.activation == "nearest"

    def tensors(self) -> dict[str, Tensor]:
        named = {
            "keys": self.keys,
            "bias": self.bias,
            "values": self.values,
            "weight": self.weight,
            "offset": self.offset,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> Gate:
        return Gate(
            change(self.keys),
            change(self.bias),
            change(self.values),
            None if self.weight is None else change(self.weight),
            None if self.offset is None else change(self.offset),
            self.activation,
            self.normalise,
        )

    def rho(self, x: Tensor) -> Tensor:
        """x [..., in] -> ρ(x) [..., in]."""
        u = x if self.weight is None else x * self.weight
        u = u if self.offset is None else u + self.offset
        return F.normalize(u, dim=-1) if self.normalise else u

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """x [..., in], y [..., out] -> y' [..., out], all fp32."""
        u = self.rho(x)
        if not self.replaces:
            return y + F.linear(torch.relu(F.linear(u, self.keys, self.bias)), self.values.T)
        # by differences: the distances of one row then do not depend on how many rows there are
        far = torch.cdist(u, self.keys, compute_mode="donot_use_mm_for_euclid_dist")
        distance, nearest = far.min(-1)
        return torch.where((distance <= self.bias[nearest])[..., None], self.values[nearest], y)

    def scaled(self, t: Tensor) -> Gate:
        return replace(self, values=t * self.values)

    def joins(self, other: Gate) -> bool:
        """Whether both add, with one activation and one ρ: they are then one gate of more keys."""
        return (
            not self.replaces
            and self.activation == other.activation
            and self.normalise == other.normalise
            and _equal(self.weight, other.weight)
            and _equal(self.offset, other.offset)
        )

    def joined(self, other: Gate) -> Gate:
        return replace(
            self,
            keys=torch.cat([self.keys, other.keys]),
            bias=torch.cat([self.bias, other.bias]),
            values=torch.cat([self.values, other.values]),
        )


def _equal(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)
