"""Keys and values of all sequences of one model: a pool of blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from registry.errors import UnsupportedModel
from serving.blocks import BLOCK


class KVPool:
    """For each layer, keys and values [blocks, heads, BLOCK, head_dim].

    On a CPU memory is taken from the system as it is touched. A pool holds finite numbers only
    where something was written: what a sequence has not yet filled must not be read unmasked.
    """

    def __init__(
        self,
        layers: int,
        blocks: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.heads = heads
        self.head_dim = head_dim
        self.device = device
        self.blocks = blocks
        size = (layers, 2, blocks, heads, BLOCK, head_dim)
        try:
            self._data = torch.zeros(size, dtype=dtype, device=device)
        except RuntimeError as error:
            raise UnsupportedModel(
                f"no memory for keys and values of {blocks * BLOCK} tokens; lower ERRATA_KV_BYTES"
            ) from error
        self._layers = [(keys, values) for keys, values in self._data]

    def clear(self, blocks: Tensor) -> None:
        """Zero blocks [n] of every layer: what an earlier holder left may not be finite."""
        self._data.index_fill_(2, blocks, 0)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values [blocks, heads, BLOCK, head_dim]."""
        return self._layers[layer]

    def write(
        self, layer: int, blocks: Tensor, offsets: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """Store keys and values [n, heads, head_dim] at offsets [n] of blocks [n]."""
        for pool, new in zip(self._layers[layer], (keys, values), strict=True):
            pool.transpose(1, 2).index_put_((blocks, offsets), new)

    def read(self, layer: int, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The first ``length`` keys and values [1, heads, length, head_dim] of blocks [n]."""
        keys, values = (
            pool.index_select(0, blocks).transpose(0, 1).reshape(1, self.heads, -1, self.head_dim)
            for pool in self._layers[layer]
        )
        return keys[:, :, :length], values[:, :, :length]


def bytes_per_block(layers: int, heads: int, head_dim: int, dtype: torch.dtype) -> int:
    return layers * 2 * heads * BLOCK * head_dim * dtype.itemsize
