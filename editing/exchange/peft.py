"""Versions as PEFT LoRA adapters, in the one form that peft, vLLM and LoRAX all read right.

One uniform r (smaller ranks padded with zeros), ``lora_alpha`` = r, no patterns, no biases, whole
paths in ``target_modules``, and every layer of a touched kind present. Factors of GPT-2's Conv1D
have the same orientation as a linear's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from editing.deltas import Effect
from editing.deltas.lowrank import Factors, factorised
from editing.exchange.config import LoraForm
from editing.exchange.names import ADAPTER_WEIGHTS, RANKS
from editing.headers import read_tensors
from editing.models.view import ModelView
from registry.errors import UnprocessableRequest

_PREFIX = "base_model.model."
_TENSOR = re.compile(
    r"base_model\.model\.(?P<path>.+)\.lora_(?:(?P<part>[AB])\.weight|embedding_(?P<row>[AB]))"
)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Adapter:
    """The two files of an adapter, and what they hold of the version.

    Attributes:
        weights: the content of ``adapter_model.safetensors``.
        report: the rank, and by module its own rank and the share of its ΔW that is left out.
    """

    config: Mapping[str, Any]
    weights: bytes
    report: Mapping[str, Any]


def write_adapter(
    view: ModelView, effects: Mapping[str, Effect], rank: int = RANKS[-1], round_rank: bool = True
) -> Adapter:
    """A stack's composed effects as an adapter.

    Args:
        rank: the most that a module gets.
        round_rank: pad to the next rank that vLLM takes.

    Raises:
        UnprocessableRequest: an effect that no adapter of this form holds; names module and part.
    """
    found = {path: _factors(view, path, effect, rank) for path, effect in effects.items()}
    if not found:
        raise _refused("the version is its untouched base: there is nothing to export")
    highest = max(factors.rank for factors in found.values())
    if round_rank:
        highest = next((allowed for allowed in RANKS if allowed >= highest), highest)
    paths = [*found, *(path for path in _companions(view, found) if path not in found)]
    tensors: dict[str, Tensor] = {}
    for path in sorted(paths):
        out, width = _shape(view, path)
        A, B = torch.zeros(highest, width), torch.zeros(out, highest)
        if path in found:
            A[: found[path].rank] = found[path].A
            B[:, : found[path].rank] = found[path].B
        tensors |= dict(zip(_names(view, path), (A, B), strict=True))
    return Adapter(
        _config(view, sorted(paths), highest),
        save_tensors(tensors, metadata={"format": "pt"}),
        _report(found, highest),
    )


def read_adapter(view: ModelView, form: LoraForm, weights: bytes) -> dict[str, Effect]:
    """An adapter's effects, without what is zero in it.

    Raises:
        UnprocessableRequest: a tensor that is no LoRA's, of a module that the base does not have,
            of a wrong shape, or not finite; names it.
    """
    try:
        read_tensors(BytesIO(weights), len(weights))
        tensors = load_tensors(weights)
    except (SafetensorError, ValueError) as error:
        raise _wrong(f"not readable as safetensors: {error}") from None
    effects = {
        path: effect
        for path, parts in _by_module(tensors).items()
        if (effect := _effect(view, form, path, parts)) is not None
    }
    if not effects:
        raise _wrong("every tensor is zero: the adapter changes nothing")
    return effects


def _factors(view: ModelView, path: str, effect: Effect, rank: int) -> Factors:
    module, matrix = view.module(path), view.matrix(path)
    if effect.gates:
        raise _refused(
            f"{path}: it has a gate, which no adapter of low rank holds; export as errata"
        )
    if matrix is None or not isinstance(module, nn.Linear | Conv1D | nn.Embedding):
        raise _refused(
            f"{path}: it is a {type(module).__name__}, and adapters are of linears and embeddings;"
            " export as huggingface or errata"
        )
    if isinstance(module, nn.Embedding) and effect.scale is not None:
        raise _refused(f"{path}: the embedding is scaled; export as huggingface or errata")
    if hasattr(module, "embed_scale"):
        raise _refused(
            f"{path}: a {type(module).__name__} multiplies what it looks up, and an adapter's part"
            " with it; export as errata"
        )
    if _moves(module, effect):
        raise _refused(
            f"{path}: its output is shifted, for which an adapter without biases has no place;"
            " export as huggingface (where the module has a bias) or errata"
        )
    return factorised(effect, matrix, rank)


def _moves(module: nn.Module, effect: Effect) -> bool:
    """Whether an effect adds to the output what depends on no input: s + (a − 1) ⊙ bias."""
    if effect.shift is not None and bool(effect.shift.any()):
        return True
    bias = getattr(module, "bias", None)
    if effect.scale is None or not isinstance(bias, Tensor):
        return False
    return bool(((effect.scale - 1) * bias.float().cpu()).any())


def _companions(view: ModelView, found: Mapping[str, Factors]) -> list[str]:
    """The modules of every layer that are of a kind that some layer has an effect on."""
    layer = re.compile(re.escape(view.paths.layers) + r"\.\d+\.(.+)")
    kinds = {match[1] for path in found if (match := layer.fullmatch(path))}
    modules = dict(view.model.named_modules())
    paths = [f"{view.paths.layers}.{i}.{kind}" for i in range(view.n_layers) for kind in kinds]
    return [path for path in paths if path in modules]


def _shape(view: ModelView, path: str) -> tuple[int, int]:
    matrix = view.matrix(path)
    if matrix is None:
        raise _refused(f"{path}: it has no weight")
    out, width = matrix.shape
    return out, width


def _names(view: ModelView, path: str) -> tuple[str, str]:
    if isinstance(view.module(path), nn.Embedding):
        return f"{_PREFIX}{path}.lora_embedding_A", f"{_PREFIX}{path}.lora_embedding_B"
    return f"{_PREFIX}{path}.lora_A.weight", f"{_PREFIX}{path}.lora_B.weight"


def _config(view: ModelView, paths: list[str], rank: int) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": view.base.name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(view.module(path), Conv1D) for path in paths),
        "target_modules": paths,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
    }


def _report(found: Mapping[str, Factors], rank: int) -> dict[str, Any]:
    energy = sum(factors.energy for factors in found.values())
    lost = sum(factors.lost for factors in found.values())
    return {
        "rank": rank,
        "residual_energy": lost / energy if energy else 0.0,
        "modules": {
            path: {"rank": factors.rank, "residual_energy": factors.residual_energy}
            for path, factors in sorted(found.items())
        },
    }


def _by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A and B by module, each name and dtype checked."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sorted(tensors.items()):
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise _wrong(
                f"{name!r} is no tensor of a plain LoRA; those are"
                f" {_PREFIX}<module>.lora_A.weight and .lora_B.weight"
            )
        if tensor.dtype not in _DTYPES or tensor.dim() != 2:
            raise _wrong(
                f"{name!r} is {tensor.dtype} with shape {tuple(tensor.shape)}; it must be a matrix"
                " of floating-point numbers"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise _wrong(f"{name!r} holds a number that is not finite")
        found.setdefault(match["path"], {})[match["part"] or match["row"]] = tensor.float()
    return found


def _effect(
    view: ModelView, form: LoraForm, path: str, parts: Mapping[str, Tensor]
) -> Effect | None:
    """What one module's factors do; None where they are zero."""
    if parts.keys() != {"A", "B"}:
        raise _wrong(f"{path}: it has {' and '.join(parts)} alone; A and B come together")
    if not form.is_of(path):
        raise _wrong(
            f"{path}: adapter_config.json does not name it (target_modules, layers_to_transform),"
            " so that peft would leave it out; name it, or take its tensors away"
        )
    try:
        matrix = view.matrix(path)
    except AttributeError:
        matrix = None
    module = None if matrix is None else view.module(path)
    if (
        matrix is None
        or not isinstance(module, nn.Linear | Conv1D | nn.Embedding)
        or hasattr(module, "embed_scale")
    ):
        raise _wrong(
            f"{path}: base {view.base.name!r} has no linear or embedding of that name; import the"
            " adapter on the base that it was trained on"
        )
    A, B = parts["A"], parts["B"]
    (out, width), r = matrix.shape, form.rank(path)
    if A.shape != (r, width) or B.shape != (out, r):
        raise _wrong(
            f"{path}: A is {tuple(A.shape)} and B is {tuple(B.shape)}; of rank {r} on base"
            f" {view.base.name!r} they would be {(r, width)} and {(out, r)}"
        )
    used = A.any(1) & B.any(0)
    if not bool(used.any()):
        return None
    return Effect(A=A[used].contiguous(), B=(form.scaling(path) * B[:, used]).contiguous())


def config_bytes(adapter: Adapter) -> bytes:
    """The content of ``adapter_config.json``."""
    return json.dumps(adapter.config, indent=2, sort_keys=True).encode() + b"\n"


def _refused(why: str) -> UnprocessableRequest:
    return UnprocessableRequest(why, code="not_exportable")


def _wrong(why: str) -> UnprocessableRequest:
    return UnprocessableRequest(f"{ADAPTER_WEIGHTS}: {why}", param="file", code="adapter_refused")
