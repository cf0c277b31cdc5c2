"""Exact order statistics of more numbers than fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence

import torch
from torch import Tensor

from registry.manifests import Progress

_HALF = 1 << 16


def order_statistics(
    passes: Callable[[], Iterator[Tensor]],
    ranks: Callable[[int], Sequence[int]],
    progress: Progress,
) -> Generator[Progress, None, Tensor]:
    """The numbers of given ranks of each of k tasks, 0 the smallest: [k, number of ranks].

    A float's bits are read as a whole number of the same order. Its upper half is counted in a
    first pass, which tells in which bin a rank falls, the lower half within that bin in a second
    one; k · 2¹⁶ counts are kept for each rank.

    Args:
        passes: starts a pass over the numbers, as pieces [k, ...] in fp32.
        ranks: from how many numbers a task has, the ranks that are wanted.
        progress: what is yielded after each piece.

    Raises:
        ValueError: there are no numbers.
    """
    upper: Tensor | None = None
    for piece in passes():
        keys = _keys(piece)
        upper = torch.zeros(len(keys), _HALF, dtype=torch.int64) if upper is None else upper
        for task, own in enumerate(keys):
            upper[task] += torch.bincount((own >> 16) + _HALF // 2, minlength=_HALF)
        yield progress
    if upper is None or not upper.any():
        raise ValueError("there are no numbers to rank")
    tasks = len(upper)
    wanted = torch.tensor(ranks(int(upper[0].sum()))).expand(tasks, -1)  # [k, R]
    ends = upper.cumsum(1)
    bins = torch.searchsorted(ends, wanted.contiguous(), right=True)
    within = wanted - (ends.gather(1, bins) - upper.gather(1, bins))
    lower = torch.zeros(*bins.shape, _HALF, dtype=torch.int64)
    for piece in passes():
        for task, own in enumerate(_keys(piece)):
            high = (own >> 16) + _HALF // 2
            for place, bin_ in enumerate(bins[task].tolist()):
                found = own[high == bin_] & (_HALF - 1)
                lower[task, place] += torch.bincount(found, minlength=_HALF)
        yield progress
    low = torch.searchsorted(lower.cumsum(2), within[..., None].contiguous(), right=True)[..., 0]
    return _floats(((bins - _HALF // 2) << 16) | low)


def _keys(piece: Tensor) -> Tensor:
    """[k, ...] fp32 -> [k, n] int32 in the same order; -0 is 0."""
    bits = (piece.flatten(1) + 0.0).view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _floats(keys: Tensor) -> Tensor:
    bits = keys.to(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)
