"""Attention over one flat row, segment by segment, as a function transformers knows by name.

No padding and no mask over the row: each segment attends to its own sequence's keys and values,
which lie in the pool's blocks. A segment of several tokens is one call; segments of one token share
one pair of products over all their blocks. The step travels as the extra keyword ``packed`` of the
model's forward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, scaled_dot_product_attention
from transformers import AttentionInterface

from serving.blocks import BLOCK
from serving.kv import KVPool
from serving.plan import Segment, StepPlan
from serving.varlen import Kernel, VarlenSegments

#: The name under which transformers finds ``packed_attention``.
NAME = "errata_packed"
#: Fewer segments of one token than this are computed one by one.
FEWEST_BATCHED = 6
#: The pool is read in place where at least this share of the range in use is wanted.
DENSE = 0.7


class KeysStored(Exception):
    """Ends a layer's forward when its keys and values are in the pool: no more was wanted."""


@dataclass(frozen=True, slots=True)
class Part:
    """A segment that attends alone: its rows, and blocks [n] where its sequence lies."""

    start: int
    stop: int
    segment: Segment
    blocks: Tensor


class PackedStep:
    """One step's segments in the flat row: computed once, read by every layer.

    Args:
        plan: the segments.
        pool: where keys and values lie.
        batched: let segments of one token share their products; else each attends alone.
        varlen: computes all segments of several tokens in one call, where there is such a kernel.

    Attributes:
        stores_only: end a layer with ``KeysStored`` as soon as its keys and values are stored.
    """

    def __init__(
        self, plan: StepPlan, pool: KVPool, *, batched: bool, varlen: Kernel | None = None
    ) -> None:
        self.pool = pool
        self.rows = plan.rows
        self.stores_only = False
        blocks: list[int] = []
        offsets: list[int] = []
        singles: list[tuple[int, Segment]] = []
        several: list[tuple[int, Segment]] = []
        begun: list[int] = []  # blocks that the step begins and does not fill
        row = 0
        for segment in plan.segments:
            if segment.position <= segment.end // BLOCK * BLOCK < segment.end:
                begun.append(segment.blocks[-1])
            for position in range(segment.position, segment.end):
                blocks.append(segment.blocks[position // BLOCK])
                offsets.append(position % BLOCK)
            (singles if len(segment.tokens) == 1 else several).append((row, segment))
            row += len(segment.tokens)
        if begun:
            pool.clear(self._indices(begun))
        self._blocks = self._indices(blocks)
        self._offsets = self._indices(offsets)
        self._masks: dict[tuple[int, int, int], Tensor] = {}
        self._batches: dict[int, SingleRows] = {}
        self._singles = singles if batched and len(singles) >= FEWEST_BATCHED else []
        if not self._singles:
            several += singles
        self.varlen = None
        if varlen is not None and several:
            self.varlen = VarlenSegments(several, pool.device, varlen)
        self.parts = [
            Part(row, row + len(segment.tokens), segment, self._indices(segment.blocks))
            for row, segment in several
        ]

    def store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Put the step's keys and values [1, heads, rows, head_dim] into the pool."""
        new_keys, new_values = keys[0].transpose(0, 1), values[0].transpose(0, 1)
        self.pool.write(
            layer, self._blocks, self._offsets, new_keys[: self.rows], new_values[: self.rows]
        )
        if self.stores_only:
            raise KeysStored

    def singles(self, window: int) -> SingleRows | None:
        """The segments of one token, where they share their products."""
        if not self._singles:
            return None
        if (batch := self._batches.get(window)) is None:
            batch = self._batches[window] = SingleRows(self._singles, self.pool, window)
        return batch

    def mask(self, count: int, length: int, window: int) -> Tensor:
        """[count, length]: which of ``length`` keys the last ``count`` tokens attend to."""
        key = (count, length, window)
        if (mask := self._masks.get(key)) is None:
            device = self.pool.device
            queries = torch.arange(length - count, length, device=device).unsqueeze(1)
            keys = torch.arange(length, device=device)
            mask = keys <= queries
            if window:
                mask &= keys > queries - window
            self._masks[key] = mask
        return mask

    def _indices(self, values: list[int] | tuple[int, ...]) -> Tensor:
        return torch.tensor(values, device=self.pool.device, dtype=torch.long)


class SingleRows:
    """Segments of one token that share their products: one product a block, one softmax a segment.

    Each block of a sequence gives partial sums; these are added by segment, in order, so no segment
    sees another's numbers.

    Args:
        segments: with the row of each.
        window: most keys that a token attends to; 0: all.
    """

    def __init__(self, segments: list[tuple[int, Segment]], pool: KVPool, window: int) -> None:
        blocks, owners, starts, firsts = _blocks_of(segments, window)
        low, high = min(blocks), max(blocks) + 1

        def indices(values: list[int]) -> Tensor:
            return torch.tensor(values, device=pool.device, dtype=torch.long)

        self.rows = indices([row for row, _ in segments])
        self._starts = indices(starts)
        hidden = _hidden(segments, indices(owners), indices(firsts), window)
        self._range: slice | None = None
        if len(set(blocks)) == len(blocks) >= DENSE * (high - low):
            self._range = slice(low, high)
            self._places = indices(blocks) - low
            self._owners = torch.zeros(high - low, dtype=torch.long, device=pool.device)
            self._owners[self._places] = indices(owners)
            self._hidden = hidden.new_zeros(high - low, 1, 1, BLOCK)
            self._hidden[self._places] = hidden
        else:
            self._blocks = indices(blocks)
            self._places = torch.arange(len(blocks), device=pool.device)
            self._owners = indices(owners)
            self._hidden = hidden

    @classmethod
    def with_room(cls, rows: int, blocks: int, pool: KVPool) -> SingleRows:
        """For ``rows`` segments over ``blocks`` blocks at most, to be filled; the rows are the flat
        row's first."""
        batch = cls.__new__(cls)
        batch._range = None
        batch.rows = torch.arange(rows, device=pool.device)
        batch._starts = torch.zeros_like(batch.rows)
        batch._places = torch.arange(blocks, device=pool.device)
        batch._blocks, batch._owners = (torch.zeros_like(batch._places) for _ in range(2))
        batch._hidden = torch.zeros(blocks, 1, 1, BLOCK, dtype=torch.bool, device=pool.device)
        return batch

    def fill(self, segments: list[tuple[int, Segment]], window: int, spare: int) -> None:
        """Take fewer segments than there is room for; the next row owns what blocks are left, which
        are ``spare``."""
        blocks, owners, starts, firsts = _blocks_of(segments, window)
        count, room = len(blocks), len(self._blocks)
        left = room - count
        device = self._blocks.device
        hidden = _hidden(
            segments,
            torch.tensor(owners, device=device),
            torch.tensor(firsts, device=device),
            window,
        )
        starts += [count] + [room] * (len(self._starts) - len(starts) - 1)
        for tensor, values in (
            (self._blocks, blocks + [spare] * left),
            (self._owners, owners + [len(segments)] * left),
            (self._starts, starts),
        ):
            tensor.copy_(torch.tensor(values))
        self._hidden[:count] = hidden
        self._hidden[count:] = False

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scaling: float, softcap: float | None
    ) -> Tensor:
        """query [rows, H, D], keys and values [blocks, Hkv, BLOCK, D] -> [segments, H, D]."""
        heads, head_dim = query.shape[1:]
        if self._range is not None:
            keys, values = keys[self._range], values[self._range]
        else:
            keys, values = keys.index_select(0, self._blocks), values.index_select(0, self._blocks)
        own = query.index_select(0, self.rows) * scaling
        count, groups = len(own), keys.shape[1]
        own = own.view(count, groups, heads // groups, head_dim).index_select(0, self._owners)
        scores = torch.matmul(own, keys.transpose(-1, -2)).float()
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores.masked_fill_(self._hidden, -math.inf)
        highest = self._by_segment(scores.amax(-1), "max")
        weights = scores.sub_(highest.index_select(0, self._owners).unsqueeze(-1)).exp_()
        summed = self._by_segment(torch.matmul(weights.to(values.dtype), values).float(), "sum")
        total = self._by_segment(weights.sum(-1), "sum")
        return summed.div_(total.unsqueeze(-1)).view(count, heads, head_dim).to(query.dtype)

    def _by_segment(self, values: Tensor, mode: str) -> Tensor:
        """[blocks, …] -> [segments, …], blocks of a segment reduced in order."""
        bags = embedding_bag(self._places, values.flatten(1), self._starts, mode=mode)
        return bags.view(len(bags), *values.shape[1:])


def _blocks_of(
    segments: list[tuple[int, Segment]], window: int
) -> tuple[list[int], list[int], list[int], list[int]]:
    """The blocks that segments of one token attend to, segment by segment; of each block its
    segment; of each segment its first among the blocks; of each block its first key's position."""
    blocks: list[int] = []
    owners: list[int] = []
    starts: list[int] = []
    firsts: list[int] = []
    for owner, (_, segment) in enumerate(segments):
        skipped = max(0, segment.end - window) // BLOCK if window else 0
        starts.append(len(blocks))
        blocks += segment.blocks[skipped:]
        owners += [owner] * (len(segment.blocks) - skipped)
        firsts += range(skipped * BLOCK, len(segment.blocks) * BLOCK, BLOCK)
    return blocks, owners, starts, firsts


def _hidden(
    segments: list[tuple[int, Segment]], owners: Tensor, firsts: Tensor, window: int
) -> Tensor:
    """[blocks, 1, 1, BLOCK]: which keys of each block its segment does not attend to."""
    ends = torch.tensor([segment.end for _, segment in segments], device=owners.device)[owners]
    positions = firsts.unsqueeze(1) + torch.arange(BLOCK, device=owners.device)
    hidden = positions >= ends.unsqueeze(1)
    if window:
        hidden |= positions < ends.unsqueeze(1) - window
    return hidden[:, None, None]


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
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, Hkv, T, D] -> output [1, T, H, D].

    The step's keys and values go to the pool first; then every segment attends causally to its
    sequence's, at most ``sliding_window`` of them for each token.
    """
    layer: int = module.layer_idx  # type: ignore[assignment]
    packed.store(layer, key, value)
    heads, total, head_dim = query.shape[1:]
    output = query.new_empty(1, total, heads, head_dim)
    output[0, packed.rows :] = 0
    window = sliding_window or 0
    by_row = query[0].transpose(0, 1)
    keys, values = packed.pool.layer(layer)
    if packed.varlen is not None and softcap is None:
        attended = packed.varlen.attend(by_row, keys, values, scaling, window)
        output[0].index_copy_(0, packed.varlen.rows, attended)
    else:
        for part in packed.parts:
            rows = slice(part.start, part.stop)
            own = query[:, :, rows]
            output[:, rows] = _attend(
                part, own, key, value, packed, layer, window, scaling, softcap
            )
    if (singles := packed.singles(window)) is not None:
        attended = singles.attend(by_row, keys, values, scaling, softcap)
        output[0].index_copy_(0, singles.rows, attended)
    return output, None


def _attend(
    part: Part,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedStep,
    layer: int,
    window: int,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """One segment's queries [1, H, n, D] -> [1, n, H, D]."""
    segment, count = part.segment, part.stop - part.start
    if segment.position == 0:  # all it attends to is in this step
        keys, values = key[:, :, part.start : part.stop], value[:, :, part.start : part.stop]
        skipped = 0
    else:
        skipped = max(0, segment.position + 1 - window) // BLOCK if window else 0
        length = segment.end - skipped * BLOCK
        keys, values = packed.pool.read(layer, part.blocks[skipped:], length)
    length = keys.shape[2]
    is_whole = count == length and not 0 < window < length
    if softcap is not None:
        attended = _softcapped(
            query, keys, values, packed.mask(count, length, window), scaling, softcap
        )
    elif count == 1 and not 0 < window < length:  # the heads of a group as queries of one head
        groups = keys.shape[1]
        attended = scaled_dot_product_attention(
            query.reshape(1, groups, -1, query.shape[-1]), keys, values, scale=scaling
        ).reshape(query.shape)
    else:
        attended = scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=None if is_whole else packed.mask(count, length, window),
            is_causal=is_whole,
            scale=scaling,
            enable_gqa=query.shape[1] != keys.shape[1],
        )
    return attended.transpose(1, 2)


def _softcapped(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float, softcap: float
) -> Tensor:
    """Attention whose scores s pass through softcap·tanh(s / softcap), as in Gemma 2."""
    groups = keys.shape[1]
    own = query.reshape(1, groups, -1, *query.shape[2:])
    scores = torch.matmul(own, keys.unsqueeze(2).transpose(-1, -2)).float() * scaling
    scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1).to(values.dtype)
    return torch.matmul(weights, values.unsqueeze(2)).flatten(1, 2)


AttentionInterface.register(NAME, packed_attention)
