"""Keys and values of all sequences of one model: a pool of slots, one slot a token."""

from __future__ import annotations

import torch
from torch import Tensor

from registry.errors import UnsupportedModel


class KVPool:
    """For each layer, keys and values [slots, heads, head_dim].

    A sequence's tokens lie in consecutive slots. Memory is taken from the system as it is touched.
    """

    def __init__(
        self, layers: int, slots: int, heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        self.heads = heads
        self.head_dim = head_dim
        try:
            self.layers = tuple(
                (
                    torch.empty(slots, heads, head_dim, dtype=dtype),
                    torch.empty(slots, heads, head_dim, dtype=dtype),
                )
                for _ in range(layers)
            )
        except RuntimeError as error:
            raise UnsupportedModel(
                f"no memory for keys and values of {slots} tokens; lower ERRATA_KV_TOKENS"
            ) from error

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [n, heads, head_dim] in slots [n]."""
        own_keys, own_values = self.layers[layer]
        own_keys.index_copy_(0, slots, keys)
        own_values.index_copy_(0, slots, values)

    def read(self, layer: int, first: int, length: int) -> tuple[Tensor, Tensor]:
        """Views [1, heads, length, head_dim] of the keys and values in a run of slots."""
        size = (1, self.heads, length, self.head_dim)
        row = self.heads * self.head_dim
        stride = (0, self.head_dim, row, 1)
        keys, values = self.layers[layer]
        offset = first * row
        return keys.as_strided(size, stride, offset), values.as_strided(size, stride, offset)
