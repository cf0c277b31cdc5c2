"""Linear modules with weights laid out beforehand for the CPU's products.

A product of few rows otherwise spends most of its time rearranging the weights. oneDNN takes them
in its own layout; one layout serves every number of rows. The modules and their weights stay as
they are: only ``forward`` is another.
"""

from __future__ import annotations

import logging
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

logger = logging.getLogger(__name__)

#: Rows the layout is chosen for; it serves other numbers as well.
ROWS = 256
#: Largest difference from the plain product, as a part of its largest number.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@torch.inference_mode()
def prepack(model: PreTrainedModel) -> int:
    """Give every linear of a model on the CPU a product with prepacked weights.

    Each is tried against the plain product first and left alone where they differ, and where this
    machine or this torch has no such product.

    Returns:
        Bytes of the packed copies.
    """
    if model.device.type != "cpu" or not _is_available(model.dtype):
        return 0
    packed_bytes = 0
    done: dict[Tensor, Tensor] = {}  # a tied weight is packed once
    for module in model.modules():
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        if module.weight not in done:
            done[module.weight] = torch.ops.mkldnn._reorder_linear_weight(
                weight.detach().contiguous(), ROWS
            )
            packed_bytes += weight.numel() * weight.element_size()
        forward = partial(_linear, done[module.weight], module.bias)
        if _agrees(module, forward, weight.shape[1]):
            module.forward = forward  # type: ignore[method-assign]
        else:
            logger.warning("a linear of shape %s is not prepacked: it differs", weight.shape)
    return packed_bytes


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _is_available(dtype: torch.dtype) -> bool:
    ops = torch.ops.mkldnn
    if dtype not in TOLERANCE or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not all(hasattr(ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
        return False
    return dtype != torch.bfloat16 or bool(ops._is_mkldnn_bf16_supported())  # AVX-512, say


def _agrees(module: nn.Linear | Conv1D, forward: partial[Tensor], features: int) -> bool:
    weight = module.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, features, generator=generator).to(weight.dtype)
    expected, packed = module(x), forward(x)
    scale = max(1e-6, float(expected.abs().max()))
    return float((packed - expected).abs().max()) <= TOLERANCE[weight.dtype] * scale
