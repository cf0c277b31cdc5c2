"""What a delta does to one module: the canonical form, and how stacks of it compose.

With input x [n, in] and the base's output y = W x [n, out]:

    y' = a ⊙ y + s + x Aᵀ Bᵀ + x Dᵀ

a, s [out] scale and shift; A [r, in], B [out, r] low-rank; D [out, in] dense.
Factors are fp32 and their sum is added before the cast to the base's dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Effect:
    """One module's effect; every part may be absent. Tensors are fp32."""

    scale: Tensor | None = None  # [out]
    shift: Tensor | None = None  # [out]
    A: Tensor | None = None  # [r, in]
    B: Tensor | None = None  # [out, r]
    dense: Tensor | None = None  # [out, in]

    def __post_init__(self) -> None:
        if (self.A is None) != (self.B is None):
            raise ValueError("low-rank effect: A and B come together")
        if self.A is not None and self.B is not None and self.A.shape[0] != self.B.shape[1]:
            raise ValueError(
                f"low-rank effect: A is {tuple(self.A.shape)}, B is {tuple(self.B.shape)};"
                " A.shape[0] must equal B.shape[1]"
            )

    @property
    def rank(self) -> int:
        return 0 if self.A is None else self.A.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.parts().values())

    def parts(self) -> dict[str, Tensor]:
        """The parts that are present, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """x [..., in], y [..., out] -> y' [..., out] in y's dtype."""
        out = y.float()
        if self.scale is not None:
            out = out * self.scale
        if self.shift is not None:
            out = out + self.shift
        x32 = x.float()
        if self.A is not None and self.B is not None:
            out = out + F.linear(F.linear(x32, self.A), self.B)
        if self.dense is not None:
            out = out + F.linear(x32, self.dense)
        return out.to(y.dtype)

    def then(self, later: Effect) -> Effect:
        """The effect of this one followed by ``later`` on the same module.

        A later scale t and shift u: a <- t⊙a, s <- t⊙s + u, B <- diag(t)B, D <- diag(t)D;
        low-rank factors concatenate and turn dense when the rank passes in·out/(in+out).
        """
        scale, shift, A, B, dense = self.scale, self.shift, self.A, self.B, self.dense
        if (t := later.scale) is not None:
            scale = t if scale is None else t * scale
            shift = None if shift is None else t * shift
            B = None if B is None else t[:, None] * B
            dense = None if dense is None else t[:, None] * dense
        shift = _added(shift, later.shift)
        dense = _added(dense, later.dense)
        if later.A is not None and later.B is not None:
            A = later.A if A is None else torch.cat([A, later.A])
            B = later.B if B is None else torch.cat([B, later.B], dim=1)
        return _turned_dense(Effect(scale, shift, A, B, dense))


def compose(stack: Iterable[Mapping[str, Effect]]) -> dict[str, Effect]:
    """Effects of a stack of deltas, in order, as one effect a module."""
    composed: dict[str, Effect] = {}
    for effects in stack:
        for module, effect in effects.items():
            composed[module] = composed[module].then(effect) if module in composed else effect
    return composed


def _added(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None:
        return second
    return first if second is None else first + second


def _turned_dense(effect: Effect) -> Effect:
    A, B = effect.A, effect.B
    if A is None or B is None:
        return effect
    out_features, in_features = B.shape[0], A.shape[1]
    if A.shape[0] * (in_features + out_features) <= in_features * out_features:
        return effect
    return replace(effect, A=None, B=None, dense=_added(effect.dense, B @ A))
