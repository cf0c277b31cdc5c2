"""What versions change, tensor by tensor: the τ that merges are made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from editing.deltas import DeltaFile, Effect, compose
from editing.models.view import ModelView

#: The tensors of a module that versions change: D [out, in], a − 1 [out] and s [out].
MATRIX, SCALE, SHIFT = "matrix", "scale", "shift"
FACTORS = {"A", "B"}


@dataclass(frozen=True)
class Input:
    """A version that is merged: its deltas, read module by module, and what it counts.

    Attributes:
        version: its id, by which its random numbers are drawn.
        layer_weights: in the weight's place for the modules of a layer.
    """

    version: str
    stack: Sequence[DeltaFile]
    weight: float = 1.0
    layer_weights: Mapping[int, float] = field(default_factory=dict)

    @cached_property
    def modules(self) -> frozenset[str]:
        return frozenset(module for delta in self.stack for module in delta.parts)

    def parts(self, module: str) -> set[str]:
        """The names of the parts that its deltas have for a module."""
        return {part for delta in self.stack for part in delta.parts.get(module, ())}

    def effect(self, module: str) -> Effect:
        """What it does to a module."""
        steps = [delta.effect(module) for delta in self.stack]
        return compose({module: e} for e in steps if e is not None).get(module, Effect())

    def effects(self) -> dict[str, Effect]:
        """What it does to every module: all of it in memory."""
        return {module: self.effect(module) for module in sorted(self.modules)}

    def weight_at(self, layer: int | None) -> float:
        return self.weight if layer is None else self.layer_weights.get(layer, self.weight)

    def draws(self, seed: int, name: str) -> torch.Generator:
        """Random numbers of its own for the tensor of that name."""
        digest = hashlib.sha256(f"{seed}/{name}/{self.version}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def touched(inputs: Iterable[Input]) -> list[str]:
    """The modules that any of the versions changes."""
    return sorted(set[str]().union(*(one.modules for one in inputs)))


def layer_of(view: ModelView, module: str) -> int | None:
    """The layer that a module is part of; None for what stands outside of them."""
    prefix = f"{view.paths.layers}."
    number = module.removeprefix(prefix).partition(".")[0]
    return int(number) if module.startswith(prefix) and number.isdecimal() else None


@torch.no_grad()
def changes(view: ModelView, inputs: Sequence[Input], module: str) -> dict[str, Tensor]:
    """By name, the changes τ [k, ...] of the k versions to a module's tensors, in fp32.

    Of a linear y = W x + b a version's effect makes (a ⊙ W + B A + D) x + a ⊙ b + s: its change is
    (a − 1) ⊙ W + B A + D of the matrix and (a − 1) ⊙ b + s of the shift. Elsewhere (norms,
    embeddings) the scale's a − 1 is a change of its own. One version is read at a time.
    """
    parts = set[str]().union(*(one.parts(module) for one in inputs))
    own = view.module(module)
    weight = view.weight(module) if isinstance(own, nn.Linear | Conv1D) else None
    bias = getattr(own, "bias", None) if weight is not None else None
    scaled = "scale" in parts
    taus: dict[str, Tensor] = {}
    for place, one in enumerate(inputs):
        effect = one.effect(module)
        if scaled and weight is None:
            _put(
                taus, SCALE, place, len(inputs), None if effect.scale is None else effect.scale - 1
            )
        matrix = effect.change(weight)
        _put(taus, MATRIX, place, len(inputs), matrix)
        shift = effect.shift
        if effect.scale is not None and isinstance(bias, Tensor):
            moved = (effect.scale - 1) * bias.float().cpu()
            shift = moved if shift is None else shift + moved
        _put(taus, SHIFT, place, len(inputs), shift)
    return taus


def _put(taus: dict[str, Tensor], name: str, place: int, count: int, change: Tensor | None) -> None:
    if change is None:
        return
    if name not in taus:
        taus[name] = torch.zeros(count, *change.shape)
    taus[name][place] = change
