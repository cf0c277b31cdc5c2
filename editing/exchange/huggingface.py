"""A version as a Hugging Face folder: its effects added to copies of the weights they change."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from editing.deltas import Effect
from editing.models.view import ModelView
from registry.errors import UnprocessableRequest

#: What is copied from the base as it is, where it is there.
_COPIED = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


@torch.no_grad()
def write_merged(view: ModelView, effects: Mapping[str, Effect], folder: Path) -> dict[str, Any]:
    """Write configuration, tokenizer and weights (safetensors) in the dtype the base is loaded in.

    Each changed weight is W' = a ⊙ W + B A + D in fp32, rounded once; biases are a ⊙ b + s. A head
    tied to its embedding is untied where an effect is on one of them alone.

    Returns:
        The dtype, and by module ``residual_energy``, the share of ‖ΔW‖² that rounding took.

    Raises:
        UnprocessableRequest: an effect that no weight holds; names module and part.
    """
    # a copy of the modules around the same tensors: the base's own are never written
    shared = {id(tensor): tensor for tensor in (*view.model.parameters(), *view.model.buffers())}
    model: PreTrainedModel = copy.deepcopy(view.model, shared)
    was_tied = _is_tied(model)
    found = {
        path: _merge(view, model.get_submodule(path), path, effect)
        for path, effect in effects.items()
    }
    if was_tied and not _is_tied(model):
        model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    for name in _COPIED:
        if (view.base.folder / name).is_file():
            shutil.copyfile(view.base.folder / name, folder / name)
    return _report(str(model.dtype).removeprefix("torch."), found)


def _merge(view: ModelView, module: nn.Module, path: str, effect: Effect) -> tuple[float, float]:
    """Give a module its new weight and bias; ‖ΔW‖² and what of it rounding took."""
    if effect.gates:
        raise _refused(f"{path}: it has a gate, which no weight holds; export as errata")
    matrix = view.matrix(path)
    if matrix is None or hasattr(module, "embed_scale"):
        raise _refused(f"{path}: a {type(module).__name__} has no weight to hold the effect")
    if effect.shift is not None or effect.scale is not None:
        _merge_bias(module, path, effect)
    if isinstance(module, nn.Linear | Conv1D | nn.Embedding):
        W = matrix.float().cpu()
        change = effect.change(W)
        if change is None:
            return 0.0, 0.0
        new = W + change
        is_transposed = isinstance(module, Conv1D | nn.Embedding)
        kept = _set(module, "weight", new.T if is_transposed else new).float()
        lost = (kept.T if is_transposed else kept) - new
        return float(change.double().square().sum()), float(lost.double().square().sum())
    if any(part is not None for part in (effect.A, effect.dense, effect.sparse)):
        raise _refused(f"{path}: a {type(module).__name__} has no matrix to hold the effect")
    if effect.scale is not None:
        # Gemma's norms multiply by 1 + w
        offset = 1.0 if type(module).__name__.startswith("Gemma") else 0.0
        weight = matrix[:, 0].float().cpu()
        new = effect.scale * (weight + offset) - offset
        lost = _set(module, "weight", new).float() - new
        energy = float((new - weight).double().square().sum())
        return energy, float(lost.double().square().sum())
    return 0.0, 0.0


def _merge_bias(module: nn.Module, path: str, effect: Effect) -> None:
    bias = getattr(module, "bias", None)
    if not isinstance(bias, Tensor):
        if effect.shift is not None and bool(effect.shift.any()):
            raise _refused(
                f"{path}: its output is shifted, and a {type(module).__name__} of this architecture"
                " has no bias to hold that; export as errata"
            )
        return
    new = bias.float().cpu()
    new = new if effect.scale is None else effect.scale * new
    _set(module, "bias", new if effect.shift is None else new + effect.shift)


def _set(module: nn.Module, name: str, value: Tensor) -> Tensor:
    """Give a module a parameter of its own, in the dtype of the one it had."""
    dtype = module.get_parameter(name).dtype
    parameter = nn.Parameter(value.to(dtype).contiguous(), requires_grad=False)
    setattr(module, name, parameter)
    return parameter.data


def _is_tied(model: PreTrainedModel) -> bool:
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head is not None and head.weight is embedding.weight


def _report(dtype: str, found: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    energy, lost = (sum(pair[place] for pair in found.values()) for place in (0, 1))
    return {
        "dtype": dtype,
        "residual_energy": _share(lost, energy),
        "modules": {
            path: {"residual_energy": _share(part, whole)}
            for path, (whole, part) in sorted(found.items())
        },
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _refused(why: str) -> UnprocessableRequest:
    return UnprocessableRequest(why, code="not_exportable")
