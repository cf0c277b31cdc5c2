"""What a delta does to one module: the canonical form, and how stacks of it compose.

With input x [n, in] and the base's output y = W x [n, out]:

    y' = a ⊙ y + s + x Aᵀ Bᵀ + x Dᵀ + G(x)

a, s [out] scale and shift; A [r, in], B [out, r] low-rank; D [out, in] dense or sparse; G gated.
Factors are fp32 and their sum is added before the cast to the base's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from editing.deltas.gate import Gate
from editing.deltas.sparse import Sparse

#: A dense effect is kept as a sparse one where at most this share of its entries is not zero.
SPARSE_UP_TO = 0.25


@dataclass(frozen=True)
class Effect:
    """One module's effect; every part may be absent. Tensors are fp32.

    A gate that replaces the output comes last and closes the form: what a stack does after it
    stays apart, as ``later``.
    """

    scale: Tensor | None = None  # [out]
    shift: Tensor | None = None  # [out]
    A: Tensor | None = None  # [r, in]
    B: Tensor | None = None  # [out, r]
    dense: Tensor | None = None  # [out, in]
    sparse: Sparse | None = None  # [out, in]
    gates: tuple[Gate, ...] = ()
    later: Effect | None = None

    def __post_init__(self) -> None:
        if (self.A is None) != (self.B is None):
            raise ValueError("low-rank effect: A and B come together")
        if self.A is not None and self.B is not None and self.A.shape[0] != self.B.shape[1]:
            raise ValueError(
                f"low-rank effect: A is {tuple(self.A.shape)}, B is {tuple(self.B.shape)};"
                " A.shape[0] must equal B.shape[1]"
            )
        if self.dense is not None and self.sparse is not None:
            raise ValueError("effect: D is either dense or sparse")
        if any(gate.replaces for gate in self.gates[:-1]):
            raise ValueError("gated effect: a gate that replaces the output comes last")
        if self.later is not None and not self.replaces:
            raise ValueError("effect: only after a gate that replaces does something stay apart")

    @property
    def rank(self) -> int:
        return 0 if self.A is None else self.A.shape[0]

    @property
    def replaces(self) -> bool:
        return bool(self.gates) and self.gates[-1].replaces

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.parts().values())

    def links(self) -> Iterator[Effect]:
        """This effect and those that follow it."""
        link: Effect | None = self
        while link is not None:
            yield link
            link = link.later

    def parts(self) -> dict[str, Tensor]:
        """The tensors that are present, by name: ``A``, ``sparse.values``, ``gates.0.keys``, …

        Those of the n-th effect that follows have ``later.n.`` before their names.
        """
        return {
            f"later.{place}.{name}" if place else name: tensor
            for place, link in enumerate(self.links())
            for name, tensor in link._own().items()
        }

    def map(self, change: Callable[[Tensor], Tensor]) -> Effect:
        """The same effect with every tensor changed: moved, copied."""

        changed: Effect | None = None
        for link in reversed(list(self.links())):
            plain: dict[str, Any] = {name: change(t) for name, t in link._plain().items()}
            changed = Effect(
                **plain,
                sparse=None if link.sparse is None else link.sparse.map(change),
                gates=tuple(gate.map(change) for gate in link.gates),
                later=changed,
            )
        return changed or Effect()

    def weight(self, W: Tensor) -> Tensor:
        """The weight [out, in] that a linear of weight W has with this effect, but for its gates:
        a ⊙ W + B A + D."""
        for link in self.links():
            if link.scale is not None:
                W = link.scale[:, None] * W
            if link.A is not None and link.B is not None:
                W = W + link.B @ link.A
            if link.dense is not None:
                W = W + link.dense
            if link.sparse is not None:
                W = W + link.sparse.dense()
        return W

    def change(self, W: Tensor | None) -> Tensor | None:
        """ΔW = (a − 1) ⊙ W + B A + D [out, in] in fp32 on the CPU, of an effect that nothing is
        later than; None where there is none of it. It is not to be written.

        Args:
            W: the weight that a scales; None where it scales no weight.
        """
        total: Tensor | None = None
        if self.scale is not None and W is not None:
            total = (self.scale - 1)[:, None] * W.float().cpu()
        if self.A is not None and self.B is not None:
            product = self.B @ self.A
            total = product if total is None else total.add_(product)
        if (D := self.dense if self.sparse is None else self.sparse.dense()) is not None:
            total = D if total is None else total.add_(D)
        return total

    def compact(self) -> Effect:
        """The effect without gradients, on the CPU, sparse where it is mostly zeros."""
        plain = self.map(lambda tensor: tensor.detach().cpu())
        D = plain.dense
        if D is None or D.count_nonzero() > SPARSE_UP_TO * D.numel():
            return plain
        return replace(plain, dense=None, sparse=Sparse.of(D))

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """x [..., in] (or ids [...] that stand for one-hot rows), y [..., out] -> y' in y's dtype.

        ``y`` itself is not written.
        """
        x32 = x.float() if x.is_floating_point() else x
        out = y.float()
        for link in self.links():
            out = link._add(x32, out)
        return out.to(y.dtype)

    def then(self, later: Effect) -> Effect:
        """The effect of this one followed by ``later`` on the same module.

        A later scale t and shift u: a <- t⊙a, s <- t⊙s + u, B <- diag(t)B, D <- diag(t)D,
        values <- t⊙values; low-rank factors concatenate and turn dense when the rank passes
        in·out/(in+out); D adds; gates of one activation and one ρ concatenate.
        """
        if self.replaces:
            after = later if self.later is None else self.later.then(later)
            return replace(self, later=after)
        earlier = self if later.scale is None else self._scaled(later.scale)
        A, B = earlier.A, earlier.B
        D = _sum(earlier._matrix, later._matrix)
        if later.A is not None and later.B is not None:
            A = later.A if A is None else torch.cat([A, later.A])
            B = later.B if B is None else torch.cat([B, later.B], dim=1)
        if A is not None and B is not None:
            (rank, in_features), out_features = A.shape, len(B)
            if rank * (in_features + out_features) > in_features * out_features:
                D = _sum(D, B @ A)
                A = B = None
        return Effect(
            scale=earlier.scale,
            shift=_added(earlier.shift, later.shift),
            A=A,
            B=B,
            dense=D if isinstance(D, Tensor) else None,
            sparse=D if isinstance(D, Sparse) else None,
            gates=_concatenated(earlier.gates, later.gates),
            later=later.later,
        )

    @property
    def _matrix(self) -> Tensor | Sparse | None:
        return self.sparse if self.dense is None else self.dense

    def _plain(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in ("scale", "shift", "A", "B", "dense")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _own(self) -> dict[str, Tensor]:
        named = self._plain()
        if self.sparse is not None:
            named |= {f"sparse.{name}": t for name, t in self.sparse.tensors().items()}
        for place, gate in enumerate(self.gates):
            named |= {f"gates.{place}.{name}": t for name, t in gate.tensors().items()}
        return named

    def _add(self, x: Tensor, out: Tensor) -> Tensor:
        """``apply`` without what is later, in fp32."""
        if self.scale is not None:
            out = out * self.scale
        if self.shift is not None:
            out = out + self.shift
        if self.A is not None and self.B is not None:
            out = out + F.linear(_product(x, self.A), self.B)
        if self.dense is not None:
            out = out + _product(x, self.dense)
        if self.sparse is not None:
            out = out + self.sparse.product(x)
        for gate in self.gates:
            out = gate.apply(x, out)
        return out

    def _scaled(self, t: Tensor) -> Effect:
        return Effect(
            scale=t if self.scale is None else t * self.scale,
            shift=None if self.shift is None else t * self.shift,
            A=self.A,
            B=None if self.B is None else t[:, None] * self.B,
            dense=None if self.dense is None else t[:, None] * self.dense,
            sparse=None if self.sparse is None else self.sparse.scaled(t),
            gates=tuple(gate.scaled(t) for gate in self.gates),
        )


def compose(stack: Iterable[Mapping[str, Effect]]) -> dict[str, Effect]:
    """Effects of a stack of deltas, in order, as one effect a module."""
    by_module: dict[str, list[Effect]] = {}
    for effects in stack:
        for module, effect in effects.items():
            by_module.setdefault(module, []).append(effect)
    return {module: _folded(effects) for module, effects in by_module.items()}


def _folded(effects: list[Effect]) -> Effect:
    """By halves: a deep stack's factors are then copied a few times, not once a delta."""
    if len(effects) == 1:
        return effects[0]
    middle = len(effects) // 2
    return _folded(effects[:middle]).then(_folded(effects[middle:]))


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """x [..., in] or ids [...], matrix [m, in] -> [..., m]."""
    return F.linear(x, matrix) if x.is_floating_point() else matrix.T[x]


def _added(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None:
        return second
    return first if second is None else first + second


def _sum(first: Tensor | Sparse | None, second: Tensor | Sparse | None) -> Tensor | Sparse | None:
    if first is None or second is None:
        return second if first is None else first
    if isinstance(first, Sparse):
        return first.plus(second)
    return second.plus(first) if isinstance(second, Sparse) else first + second


def _concatenated(first: tuple[Gate, ...], second: tuple[Gate, ...]) -> tuple[Gate, ...]:
    gates = list(first)
    for gate in second:
        place = next((i for i, own in enumerate(gates) if own.joins(gate)), None)
        if place is None:
            gates.append(gate)
        else:
            gates[place] = gates[place].joined(gate)
    return tuple(gates)
