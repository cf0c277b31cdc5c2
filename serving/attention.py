"""Attention over one flat row, segment by segment, as a function transformers knows by name.

No padding and no mask over the row: each segment attends to its own sequence's keys and values,
which lie in the pool. The step travels as the extra keyword ``packed`` of the model's forward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from serving.kv import KVPool
from serving.plan import StepPlan

#: The name under which transformers finds ``packed_attention``.
NAME = "errata_packed"


class PackedStep:
    """One step's segments in the flat row: computed once, read by every layer.

    Attributes:
        slots: [rows] pool slot of each row (rows that only pad the flat row have none).
        segments: first row, row after the last, first pool slot, keys to attend to.
    """

    def __init__(self, plan: StepPlan, pool: KVPool) -> None:
        self.pool = pool
        slots: list[int] = []
        self.segments: list[tuple[int, int, int, int]] = []
        row = 0
        for segment in plan.segments:
            count = len(segment.tokens)
            first = segment.slot + segment.position
            slots.extend(range(first, first + count))
            self.segments.append((row, row + count, segment.slot, segment.position + count))
            row += count
        self.rows = row
        self.slots = torch.tensor(slots)
        self._masks: dict[tuple[int, int, int], Tensor] = {}

    def mask(self, count: int, length: int, window: int) -> Tensor:
        """[count, length]: which of ``length`` keys the last ``count`` tokens attend to."""
        key = (count, length, window)
        if (mask := self._masks.get(key)) is None:
            queries = torch.arange(length - count, length).unsqueeze(1)
            keys = torch.arange(length)
            mask = (keys <= queries) & (keys > queries - window)
            self._masks[key] = mask
        return mask


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packed: PackedStep,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, Hkv, T, D] -> output [1, T, H, D].

    The step's keys and values go to the pool first; then every segment attends causally to its
    sequence's, at most ``sliding_window`` of them for each token.
    """
    pool, rows = packed.pool, packed.rows
    heads, total, head_dim = query.shape[1:]
    groups = pool.heads
    layer: int = module.layer_idx  # type: ignore[assignment]
    new_keys, new_values = key[0].transpose(0, 1), value[0].transpose(0, 1)  # [T, Hkv, D]
    pool.write(layer, packed.slots, new_keys[:rows], new_values[:rows])
    by_row = query[0].transpose(0, 1).view(total, groups, heads // groups, head_dim)
    output = query.new_empty(1, total, heads, head_dim)
    flat = output[0]
    flat[rows:] = 0
    window = sliding_window or 0
    for start, stop, slot, length in packed.segments:
        count = stop - start
        skipped = max(0, length - count - window + 1) if window else 0
        keys, values = pool.read(layer, slot + skipped, length - skipped)
        if count == 1:  # the heads of a group as so many queries of one head
            attended = scaled_dot_product_attention(by_row[start:stop], keys, values, scale=scaling)
            flat[start] = attended.view(heads, head_dim)
            continue
        is_whole = count == length and not 0 < window < length
        attended = scaled_dot_product_attention(
            query[:, :, start:stop],
            keys,
            values,
            attn_mask=None if is_whole else packed.mask(count, length - skipped, window or length),
            is_causal=is_whole,
            scale=scaling,
            enable_gqa=heads != groups,
        )
        flat[start:stop] = attended[0].transpose(0, 1)
    return output, None


AttentionInterface.register(NAME, packed_attention)
