"""Many versions' effects on one module at once: a few products a module, not a few a version.

With x [n, in] whose rows stand in the order of versions, and factors A_v [r_v, in], B_v [out, r_v]:

    masked   y += (x A_catᵀ ⊙ M) B_catᵀ, where A_cat [Σr, in], B_cat [out, Σr] are all versions'
             factors and M [n, Σr] says whose a row is
    batched  y_v += x_v A_vᵀ B_vᵀ as one batched product over versions, padded to the longest
    sliced   the same, version by version

Masking computes n·Σr where Σ n_v·r_v is needed, batching pads, slicing pays a call a version, and
the first two put all factors together first, which pays once it serves some steps. A small model
of these costs chooses. Scales and shifts are gathered by row, or sliced. Dense, sparse
and gated effects have no common product: those versions are sliced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from editing.deltas import Effect

#: What a call costs, in multiply-adds of a product (one core with AVX-512; any GPU).
CALL_CPU = 150_000
CALL_GPU = 100_000_000
#: What it costs to read and write a number again, and to put one into new memory, in the same unit.
TRAFFIC = 12
JOIN = 120
#: A batched product takes as long for fewer rows a version as for so many.
BATCHED_ROWS = 4


@dataclass(frozen=True, slots=True)
class Share:
    """One version's effect on a module, and its rows: from ``start`` to before ``stop``."""

    effect: Effect
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


#: Changes y [n, out] in place by x [n, in] or ids [n].
Way = Callable[[Tensor, Tensor], None]


class Gathered:
    """The effects of one module in steps of one layout.

    Args:
        shares: at least one, in the order of their rows, which do not overlap.
        device: the model's.
        by_ids: whether the module is an embedding, whose input is ids.
        before: of the layout before this one; factors put together there are used again.
    """

    def __init__(
        self,
        shares: Sequence[Share],
        device: torch.device,
        *,
        by_ids: bool = False,
        before: Gathered | None = None,
    ) -> None:
        call = CALL_CPU if device.type == "cpu" else CALL_GPU
        simple = [share for share in shares if _is_simple(share.effect)]
        self._whole = [share for share in shares if not _is_simple(share.effect)]
        self._window = slice(simple[0].start, simple[-1].stop) if simple else slice(0, 0)
        first = self._window.start
        inside = [Share(s.effect, s.start - first, s.stop - first) for s in simple]
        affine = [s for s in inside if s.effect.scale is not None or s.effect.shift is not None]
        low_rank = [share for share in inside if share.effect.rank]
        rows = self._window.stop - first
        self._ways: list[Way] = []
        self._factors: _LowRank | None = None
        if affine:
            self._ways.append(_affine(affine, rows, call, device))
        if low_rank:
            earlier = None if before is None else before._factors
            self._factors = _LowRank(low_rank, rows, call, device, by_ids, earlier)
            self._ways.append(self._factors.way)

    def add(self, x: Tensor, y: Tensor) -> None:
        """x [n, in] or ids [n], y [n, out]: changes y in place."""
        for share in self._whole:
            rows = slice(share.start, share.stop)
            y[rows] = share.effect.apply(x[rows], y[rows])
        if not self._ways:
            return
        x, out = x[self._window], y[self._window]
        x = x.float() if x.is_floating_point() else x
        changed = out.float()  # itself, where it is fp32
        for way in self._ways:
            way(x, changed)
        if self._factors is not None:
            self._factors.steps += 1
        if changed is not out:
            out.copy_(changed)


def _is_simple(effect: Effect) -> bool:
    return effect.dense is None and effect.sparse is None and not effect.gates


def _affine(shares: Sequence[Share], rows: int, call: int, device: torch.device) -> Way:
    """Scales and shifts; the rest of each effect is not looked at."""
    effects = [share.effect for share in shares]
    (out,) = next(part.shape for part in effects[0].parts().values() if part.dim() == 1)
    sliced = sum(share.rows for share in shares) * TRAFFIC * out + len(shares) * call
    if sliced < 6 * rows * TRAFFIC * out + 3 * call:

        def by_version(_: Tensor, y: Tensor) -> None:
            for share in shares:
                own = y[share.start : share.stop]
                if share.effect.scale is not None:
                    own.mul_(share.effect.scale)
                if share.effect.shift is not None:
                    own.add_(share.effect.shift)

        return by_version

    one, zero = torch.ones(out, device=device), torch.zeros(out, device=device)
    scales = torch.stack([*(one if e.scale is None else e.scale for e in effects), one])
    shifts = torch.stack([*(zero if e.shift is None else e.shift for e in effects), zero])
    owners = _owners(shares, rows, nobody=len(shares)).to(device)

    def by_row(_: Tensor, y: Tensor) -> None:
        torch.addcmul(shifts[owners], y, scales[owners], out=y)

    return by_row


def _owners(shares: Sequence[Share], rows: int, nobody: int) -> Tensor:
    """[rows] the place among ``shares`` of the one that a row belongs to, or ``nobody``."""
    owners: list[int] = []
    for place, share in enumerate(shares):
        owners += [nobody] * (share.start - len(owners))
        owners += [place] * share.rows
    owners += [nobody] * (rows - len(owners))
    return torch.tensor(owners)


class _LowRank:
    """The low-rank parts of a module's effects, put together in the way that costs least.

    Attributes:
        way: adds them.
        steps: how many these factors have been together for; they are expected to stay as long.
    """

    def __init__(
        self,
        shares: Sequence[Share],
        rows: int,
        call: int,
        device: torch.device,
        by_ids: bool,
        before: _LowRank | None,
    ) -> None:
        self._shares = shares
        self._pairs = [_factors(share.effect) for share in shares]
        self._rows = rows
        self._device = device
        self._longest = max(share.rows for share in shares)
        self._joined: tuple[Tensor, Tensor] | None = None
        self.steps = 1
        joined = None
        if before is not None and before._pairs_are(self._pairs):
            self.steps, joined = before.steps, before._kind
        costs = self._costs(call, joined)
        if by_ids:
            del costs["batched"]
        self._kind: str = min(costs, key=costs.__getitem__)
        if before is not None and joined == self._kind:
            self._joined = before._joined
        ways = {"masked": self._masked, "batched": self._batched, "sliced": self._sliced}
        self.way: Way = ways[self._kind]()

    def _pairs_are(self, pairs: list[tuple[Tensor, Tensor]]) -> bool:
        return len(pairs) == len(self._pairs) and all(
            own[0] is other[0] and own[1] is other[1]
            for own, other in zip(self._pairs, pairs, strict=True)
        )

    def _costs(self, call: int, joined: str | None) -> dict[str, float]:
        """Of each way in one step, when the factors are put together for the way ``joined``."""
        versions, ranks = len(self._pairs), [len(A) for A, _ in self._pairs]
        width = self._pairs[0][0].shape[1] + len(self._pairs[0][1])

        def work(rows: int, rank: int) -> int:
            return rows * (rank + TRAFFIC) * width

        filled = versions * max(self._longest, BATCHED_ROWS)
        moved = 0 if self._is_even else 2 * filled * TRAFFIC * width + 4 * call
        sliced = sum(work(s.rows, rank) for s, rank in zip(self._shares, ranks, strict=True))
        costs: dict[str, float] = {
            "masked": work(self._rows, sum(ranks)) + 3 * call,
            "batched": work(filled, max(ranks)) + moved + 2 * call,
            "sliced": sliced + 3 * versions * call,
        }
        for way in {"masked", "batched"} - {joined}:
            costs[way] += JOIN * sum(ranks) * width / self.steps
        return costs

    @property
    def _is_even(self) -> bool:
        """Whether every row is some version's, and all have as many."""
        rows = [share.rows for share in self._shares]
        return sum(rows) == self._rows and min(rows) == self._longest

    def _sliced(self) -> Way:
        def way(x: Tensor, y: Tensor) -> None:
            for (A, B), share in zip(self._pairs, self._shares, strict=True):
                own = slice(share.start, share.stop)
                y[own].addmm_(_product(x[own], A), B.T)

        return way

    def _masked(self) -> Way:
        if self._joined is None:
            A_cat = torch.cat([A for A, _ in self._pairs])
            B_cat = torch.cat([B for _, B in self._pairs], dim=1)
            self._joined = A_cat, B_cat.T
        A, B = self._joined  # [Σr, in], [Σr, out]
        columns = [place for place, (own, _) in enumerate(self._pairs) for _ in range(len(own))]
        rows = _owners(self._shares, self._rows, nobody=-1)
        foreign = (rows[:, None] != torch.tensor(columns)).to(self._device)

        def way(x: Tensor, y: Tensor) -> None:
            # filled, not multiplied: another version's product may be infinite
            y.addmm_(_product(x, A).masked_fill_(foreign, 0), B)

        return way

    def _batched(self) -> Way:
        versions, longest = len(self._shares), self._longest
        if self._joined is None:
            self._joined = (
                _stacked([A for A, _ in self._pairs]).transpose(1, 2),
                _stacked([B.T for _, B in self._pairs]),
            )
        A, B = self._joined  # [V, in, r], [V, r, out]

        def even(x: Tensor, y: Tensor) -> None:
            hidden = torch.bmm(x.reshape(versions, longest, -1), A)
            y.view(versions, longest, -1).baddbmm_(hidden, B)

        if self._is_even:
            return even
        padded: list[int] = []  # the row at each place of the batch; a short version's last again
        own: list[int] = []  # the places that are no padding
        for share in self._shares:
            own.extend(range(len(padded), len(padded) + share.rows))
            padded.extend(range(share.start, share.stop))
            padded.extend([share.stop - 1] * (longest - share.rows))
        taken, kept = torch.tensor(padded).to(self._device), torch.tensor(own).to(self._device)
        targets = taken[kept]

        def uneven(x: Tensor, y: Tensor) -> None:
            hidden = torch.bmm(x[taken].view(versions, longest, -1), A)
            y.index_add_(0, targets, torch.bmm(hidden, B).flatten(0, 1)[kept])

        return uneven


def _factors(effect: Effect) -> tuple[Tensor, Tensor]:
    if effect.A is None or effect.B is None:
        raise ValueError("the effect has no low-rank part")
    return effect.A, effect.B


def _stacked(factors: list[Tensor]) -> Tensor:
    """Factors [r_v, m] -> [V, r, m], shorter ones ending in zeros."""
    rank = max(map(len, factors))
    return torch.stack(
        [f if len(f) == rank else F.pad(f, (0, 0, 0, rank - len(f))) for f in factors]
    )


def _product(x: Tensor, A: Tensor) -> Tensor:
    """x [n, in] or ids [n] -> x Aᵀ [n, r]."""
    return F.linear(x, A) if x.is_floating_point() else A.T[x]
