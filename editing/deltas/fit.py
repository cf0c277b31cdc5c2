"""Whether a delta is one of a base: made on it, and of the shapes of its modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from editing.deltas.delta import Delta
from editing.deltas.effect import Effect
from editing.deltas.file import DeltaFile
from registry.errors import ArtifactCorrupt


def read_fitting(data: bytes, model: PreTrainedModel, base_digest: str) -> Delta:
    """A delta's file, checked as ``Delta.from_bytes`` does and against the base that it is for.

    Raises:
        ArtifactCorrupt: it is no delta, was made on another base, or has an effect that fits no
            module of this one.
    """
    delta = Delta.from_bytes(data)
    _check_base(delta.base_digest, base_digest)
    _check(model, delta.effects)
    return delta


def check_file(file: DeltaFile, model: PreTrainedModel, base_digest: str) -> None:
    """As ``read_fitting``, of which one module is in memory at a time. Raises as it does."""
    _check_base(file.base_digest, base_digest)
    for module in file.parts:
        effect = file.effect(module)
        _check(model, {} if effect is None else {module: effect})


def _check_base(found: str, expected: str) -> None:
    if found != expected:
        raise ArtifactCorrupt(
            f"delta file: it was made on a base with digest {found}; this one has {expected}"
        )


def _check(model: PreTrainedModel, effects: Mapping[str, Effect]) -> None:
    try:
        check_effects(model, effects)
    except ValueError as error:
        raise ArtifactCorrupt(f"delta file: it does not fit the base: {error}") from None


def check_effects(model: PreTrainedModel, effects: Mapping[str, Effect]) -> None:
    """Check that every effect fits the module it names.

    Raises:
        ValueError: says which does not, and why.
    """
    modules = dict(model.named_modules())
    for path, effect in effects.items():
        shape = _shape(path, modules, model)
        if shape is None:
            raise ValueError(f"the base has no linear, norm, embedding or MLP called {path!r}")
        for link in effect.links():
            if link.gates and isinstance(modules[path], nn.Embedding):
                raise ValueError(f"{path!r}: an embedding's input is ids, which no gate can read")
            for part, (found, needed) in _part_shapes(link, *shape).items():
                if found != needed:
                    raise ValueError(f"{path!r}: {part} is {found}, the base needs {needed}")


def _part_shapes(
    link: Effect, in_features: int, out_features: int
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shape of each part of an effect, and the one that a module needs."""
    needed: dict[str, tuple[int, ...]] = {
        "scale": (out_features,),
        "shift": (out_features,),
        "A": (link.rank, in_features),
        "B": (out_features, link.rank),
        "dense": (out_features, in_features),
    }
    for place, gate in enumerate(link.gates):
        count = len(gate.keys)
        needed[f"gates.{place}.keys"] = (count, in_features)
        needed[f"gates.{place}.values"] = (count, out_features)
    parts = replace(link, later=None).parts()
    shapes = {
        part: (tuple(parts[part].shape), right) for part, right in needed.items() if part in parts
    }
    if link.sparse is not None:
        shapes["sparse"] = link.sparse.shape, (out_features, in_features)
    return shapes


def _shape(
    path: str, modules: Mapping[str, nn.Module], model: PreTrainedModel
) -> tuple[int, int] | None:
    """Inputs and outputs of a module that an effect may touch."""
    module = modules.get(path)
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, nn.Embedding):
        # others may be called with more than ids
        if type(module) is nn.Embedding or module is model.get_input_embeddings():
            return module.num_embeddings, module.embedding_dim
        return None
    if module is not None and _is_mlp(
        module, modules.get(path.rpartition(".")[0].rpartition(".")[0])
    ):
        hidden = model.config.hidden_size
        return hidden, hidden
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 1:
        return weight.numel(), weight.numel()
    return None


def _is_mlp(module: nn.Module, grandparent: nn.Module | None) -> bool:
    """Whether it is the part of a layer, of any family, that has linears and is no attention."""
    return (
        isinstance(grandparent, nn.ModuleList)
        and not hasattr(module, "layer_idx")
        and any(isinstance(part, nn.Linear | Conv1D) for part in module.modules())
    )
