"""How many rows a product needs on this machine so that a row's bits do not depend on the others.

Matrix products choose their kernel by the number of rows, and kernels add in another order. Above
some small number all counts agree; every product of a step is padded up to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from editing.deltas import Sparse

#: More padding than this is not worth it.
MOST_ROWS = 32
_COUNTS = (*range(1, 18), 23, 24, 25, 31, 32, 33, 47, 48, 63, 64, 65, 127, 128, 129, 256)
_FEW_COUNTS = (*range(1, 14), 15, 16, 17, 24, 25, 31, 32, 33, 64)
_LARGE = 2**21  # weights of a product that is tried on few counts
_RANKS = (2, 5, 16)  # rank 1 is padded to 2 (serving.effects): one column is another kernel

Product = Callable[[Tensor], Tensor]


@torch.inference_mode()
def find_min_rows(model: PreTrainedModel) -> int | None:
    """The fewest rows from which on all tried counts give equal bits; None if there is none."""
    generator = torch.Generator().manual_seed(0)
    unstable = 0
    for features, weights, dtype, product in _products(model, generator):
        counts = _COUNTS if weights <= _LARGE else _FEW_COUNTS
        x = torch.randn(counts[-1], features, generator=generator).to(model.device, dtype)
        expected = product(x)
        for count in reversed(counts):
            if count <= unstable:
                break
            rows = slice(len(x) - count, len(x))
            if not (
                torch.equal(product(x[:count]), expected[:count])
                and torch.equal(product(x[rows]), expected[rows])
            ):
                unstable = count
    return unstable + 1 if unstable < MOST_ROWS else None


def _products(
    model: PreTrainedModel, generator: torch.Generator
) -> Iterator[tuple[int, int, torch.dtype, Product]]:
    """Each shape of product in the model and in effects: inputs, weights, dtype, product."""
    modules: dict[tuple[type, int, int, bool], nn.Module] = {}
    shapes: set[tuple[int, int]] = set()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            shape = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            shape = (module.nf, module.nx)
        else:
            continue
        modules.setdefault((type(module), *shape, module.bias is None), module)
        shapes.add(shape)
    for (_, out, inputs, _), module in modules.items():
        yield inputs, inputs * out, model.dtype, module
    low_rank = {pair for out, inputs in shapes for r in _RANKS for pair in ((r, inputs), (out, r))}
    for out, inputs in sorted(shapes | low_rank):
        weight = torch.randn(out, inputs, generator=generator).to(model.device)
        yield inputs, inputs * out, torch.float32, partial(F.linear, weight=weight)
    for out, inputs in sorted(shapes)[:1]:  # of a sparse matrix the shape does not matter
        dense = F.threshold(torch.randn(out, inputs, generator=generator), 1, 0)
        product = Sparse.of(dense.to(model.device)).product
        yield inputs, inputs * out, torch.float32, product
