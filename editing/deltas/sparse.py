"""A sparse matrix in compressed rows: the D of methods that change few of a module's weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

with warnings.catch_warnings():  # torch says once in a process that its layout is young
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1), check_invariants=False)


@dataclass(frozen=True)
class Sparse:
    """D [out, in] with n entries that are stored.

    Raises:
        ValueError: the tensors describe no such matrix.
    """

    starts: Tensor  # [out + 1] int32, where each row begins in ``columns`` and ``values``
    columns: Tensor  # [n] int32, rising within a row
    values: Tensor  # [n] fp32
    in_features: int

    def __post_init__(self) -> None:
        starts, columns, values = self.starts, self.columns, self.values
        count = values.numel()
        if starts.numel() < 2 or tuple(columns.shape) != (count,):
            raise ValueError(
                f"sparse effect: starts {tuple(starts.shape)}, columns {tuple(columns.shape)} and"
                f" values {tuple(values.shape)}; they are [out + 1], [n] and [n]"
            )
        steps = starts.long().diff()  # in 64 bits: a hostile difference could wrap
        if starts[0] != 0 or starts[-1] != count or bool((steps < 0).any()):
            raise ValueError(f"sparse effect: starts must rise from 0 to {count}")
        if count == 0:
            return
        if int(columns.min()) < 0 or int(columns.max()) >= self.in_features:
            raise ValueError(f"sparse effect: columns must lie in 0 to {self.in_features - 1}")
        rows = self.rows
        if bool(((columns.diff() <= 0) & (rows.diff() == 0)).any()):
            raise ValueError("sparse effect: columns must rise within a row")

    @classmethod
    def of(cls, dense: Tensor) -> Self:
        """The entries of D [out, in] that are not zero."""
        rows, columns = dense.nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=dense.shape[0])
        starts = F.pad(counts.cumsum(0), (1, 0))
        return cls(starts.int(), columns.int(), dense[rows, columns], dense.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        return self.starts.numel() - 1, self.in_features

    @property
    def rows(self) -> Tensor:
        """[n] the row of each entry."""
        out = torch.arange(self.shape[0], device=self.starts.device)
        return out.repeat_interleave(self.starts.diff(), output_size=self.values.numel())

    def tensors(self) -> dict[str, Tensor]:
        return {"starts": self.starts, "columns": self.columns, "values": self.values}

    def map(self, change: Callable[[Tensor], Tensor]) -> Sparse:
        return Sparse(
            change(self.starts), change(self.columns), change(self.values), self.in_features
        )

    def dense(self) -> Tensor:
        """D [out, in]."""
        dense = self.values.new_zeros(self.shape)
        dense[self.rows, self.columns] = self.values
        return dense

    def product(self, x: Tensor) -> Tensor:
        """x [..., in] -> x Dᵀ [..., out]; ids [...] stand for one-hot rows."""
        if not x.is_floating_point():
            return self._columns(x.flatten()).view(*x.shape, self.shape[0])
        matrix = torch.sparse_csr_tensor(
            self.starts, self.columns, self.values, self.shape, check_invariants=False
        )
        return (matrix @ x.flatten(0, -2).T).T.view(*x.shape[:-1], self.shape[0])

    def scaled(self, t: Tensor) -> Sparse:
        """diag(t) D."""
        return replace(self, values=t[self.rows] * self.values)

    def plus(self, other: Tensor | Sparse) -> Tensor | Sparse:
        """The sum: sparse while that is smaller than the dense matrix."""
        if isinstance(other, Tensor):
            return self.dense() + other
        out, in_features = self.shape
        places = torch.cat([matrix.rows * in_features + matrix.columns for matrix in (self, other)])
        places, origin = torch.unique(places, return_inverse=True)
        if 2 * places.numel() + out + 1 >= out * in_features:
            return self.dense() + other.dense()
        values = self.values.new_zeros(places.numel())
        values.index_add_(0, origin, torch.cat([self.values, other.values]))
        counts = torch.bincount(places // in_features, minlength=out)
        starts = F.pad(counts.cumsum(0), (1, 0))
        return Sparse(starts.int(), (places % in_features).int(), values, in_features)

    def _columns(self, ids: Tensor) -> Tensor:
        """Columns [n, out] of D."""
        wanted, origin = torch.unique(ids, return_inverse=True)
        place = wanted.new_full((self.in_features,), -1)
        place[wanted] = torch.arange(wanted.numel(), device=ids.device)
        place = place[self.columns]
        found = place >= 0
        columns = self.values.new_zeros(wanted.numel(), self.shape[0])
        columns[place[found], self.rows[found]] = self.values[found]
        return columns[origin]
