"""All segments of several tokens in one call: variable-length attention, where a GPU has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor

from serving.blocks import BLOCK
from serving.plan import Segment

#: ``torch.nn.attention.varlen.varlen_attn``, or what computes the same.
Kernel = Callable[..., Tensor]


def kernel_for(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """Torch's variable-length attention of grouped queries: on GPUs, in half precision."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # an older torch
        return None
    knows_groups = "enable_gqa" in signature(varlen_attn).parameters  # from torch 2.12 on
    return cast(Kernel, varlen_attn) if knows_groups else None


class VarlenSegments:
    """Segments with the rows of their queries and the places of their keys.

    Args:
        segments: with the first row of each.
    """

    def __init__(
        self, segments: Sequence[tuple[int, Segment]], device: torch.device, kernel: Kernel
    ) -> None:
        self._kernel = kernel
        rows: list[int] = []
        blocks: list[int] = []
        offsets: list[int] = []
        for row, segment in segments:
            rows += range(row, row + len(segment.tokens))
            for position in range(segment.end):
                blocks.append(segment.blocks[position // BLOCK])
                offsets.append(position % BLOCK)
        counts = [len(segment.tokens) for _, segment in segments]
        lengths = [segment.end for _, segment in segments]
        self._longest = max(counts), max(lengths)

        def indices(values: list[int], dtype: torch.dtype = torch.long) -> Tensor:
            return torch.tensor(values, device=device, dtype=dtype)

        self.rows = indices(rows)
        self._places = indices(blocks), indices(offsets)
        self._ends = (
            indices([0, *accumulate(counts)], torch.int32),
            indices([0, *accumulate(lengths)], torch.int32),
        )

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int
    ) -> Tensor:
        """query [rows, H, D], keys and values [blocks, Hkv, BLOCK, D] -> [own rows, H, D].

        Causal, the last query beside the last key; at most ``window`` keys a query (0: all).
        """
        own_keys, own_values = (
            pool.transpose(1, 2)[self._places] for pool in (keys, values)
        )  # [own keys, Hkv, D]
        return self._kernel(
            query.index_select(0, self.rows),
            own_keys,
            own_values,
            *self._ends,
            *self._longest,
            scale=scaling,
            window_size=(window - 1 if window else -1, 0),
            enable_gqa=query.shape[1] != own_keys.shape[1],
        )
