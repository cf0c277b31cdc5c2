"""Versions of one base merged into one delta, one module after the other."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from editing.deltas import DeltaWriter, Effect
from editing.deltas.lowrank import truncated
from editing.merging.catalogue import MergeEntry
from editing.merging.changes import (
    FACTORS,
    MATRIX,
    SCALE,
    SHIFT,
    Input,
    changes,
    layer_of,
    touched,
)
from editing.merging.conflicts import Conflicts
from editing.merging.hyperparameters import MergeHyperparameters
from editing.merging.interface import Merge
from editing.models.view import ModelView
from registry.errors import JobFailed
from registry.manifests import Progress

#: The method of merged deltas.
METHOD = "merge"


@dataclass(frozen=True)
class Plan:
    """How versions are merged.

    Attributes:
        seed: of what is random.
        rank: most rank of a merged matrix; None keeps it as it is.
    """

    entry: MergeEntry
    hyperparameters: MergeHyperparameters
    seed: int = 0
    rank: int | None = None


@dataclass
class Residual:
    """What low rank left out: by module its rank and ‖D − B A‖²/‖D‖², and over all."""

    modules: dict[str, dict[str, float]] = field(default_factory=dict)
    lost: float = 0.0
    whole: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "energy": self.lost / self.whole if self.whole else 0.0,
            "modules": self.modules,
        }


@torch.no_grad()
def merge(
    view: ModelView, inputs: Sequence[Input], plan: Plan, writer: DeltaWriter
) -> Generator[Progress, None, tuple[Conflicts, Residual]]:
    """Merge versions into ``writer``; yields progress. In memory is one module of each at a time.

    The inputs are taken in the order of their versions' ids, so that the order in which they are
    named changes no bit; where a method is ``ordered`` the last one stays the last.

    Raises:
        JobFailed: the merged numbers are not finite.
    """
    first = inputs[:-1] if plan.entry.ordered else inputs
    ordered = [*sorted(first, key=lambda one: one.version), *inputs[len(first) :]]
    conflicts, residual = Conflicts([one.version for one in ordered]), Residual()
    function = yield from _function(view, ordered, plan)
    modules = touched(inputs)
    for place, module in enumerate(modules):
        yield Progress(place, len(modules), f"merging {module}")
        layer = layer_of(view, module)
        weights = torch.tensor([one.weight_at(layer) for one in ordered])
        found: dict[str, Tensor] = {}
        for part, taus in changes(view, ordered, module).items():
            conflicts.add(layer, taus)
            name = f"{module}/{part}"
            draws = [one.draws(plan.seed, name) for one in ordered]
            found[part] = function(taus, weights, plan.hyperparameters, draws)
            found[part] *= plan.hyperparameters.scale
            if not bool(found[part].isfinite().all()):
                raise JobFailed(
                    f"method {plan.entry.name!r} made numbers of {module!r} that are not finite;"
                    " give it milder hyperparameters and weights"
                )
        effect = _factors(ordered, module, weights, plan) or _effect(module, found, plan, residual)
        if effect is not None:
            writer.add(module, effect)
    return conflicts, residual


@torch.no_grad()
def compare(view: ModelView, inputs: Sequence[Input]) -> Generator[Progress, None, Conflicts]:
    """The report on versions, of which nothing is made."""
    conflicts = Conflicts([one.version for one in inputs])
    modules = touched(inputs)
    for place, module in enumerate(modules):
        yield Progress(place, len(modules), f"comparing {module}")
        for taus in changes(view, inputs, module).values():
            conflicts.add(layer_of(view, module), taus)
    return conflicts


def merge_state(inputs: Sequence[Input], writer: DeltaWriter) -> None:
    """What later steps need of the versions' deltas: one after the other along the last dimension,
    where each column is of one edit. Of a delta that several versions share, once."""
    deltas = {delta.path: delta for one in inputs for delta in one.stack}
    states: dict[str, list[Tensor]] = {}
    for path in sorted(deltas):
        for name, tensor in deltas[path].state().items():
            states.setdefault(name, []).append(tensor)
    for name, tensors in states.items():
        writer.add_state(name, torch.cat(tensors, dim=-1))


def _function(
    view: ModelView, inputs: Sequence[Input], plan: Plan
) -> Generator[Progress, None, Merge]:
    loaded = plan.entry.load()
    if not plan.entry.whole or not touched(inputs):
        merge_one: Merge = loaded
        return merge_one

    def tensors() -> Iterator[Tensor]:
        for module in touched(inputs):
            yield from changes(view, inputs, module).values()

    whole: Merge = yield from loaded(tensors, plan.hyperparameters)
    return whole


def _factors(inputs: Sequence[Input], module: str, weights: Tensor, plan: Plan) -> Effect | None:
    """All versions' low-rank factors side by side; None where they are not all of them."""
    parts = set[str]().union(*(one.parts(module) for one in inputs))
    if not plan.entry.factors or plan.rank is not None or not parts <= FACTORS:
        return None
    effects = [one.effect(module) for one in inputs]
    pairs = [
        (effect.A, effect.B * (weight * plan.hyperparameters.scale))
        for effect, weight in zip(effects, weights, strict=True)
        if effect.A is not None and effect.B is not None and weight != 0
    ]
    if not pairs or any(effect.dense is not None for effect in effects):
        return None
    A, B = torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], dim=1)
    is_small = len(A) * (A.shape[1] + len(B)) <= A.shape[1] * len(B)
    return Effect(A=A, B=B) if is_small else None


def _effect(
    module: str, found: Mapping[str, Tensor], plan: Plan, residual: Residual
) -> Effect | None:
    """The effect of merged tensors: dense, sparse where mostly zero, or of low rank; None where
    nothing is left."""
    kept = {name: tensor for name, tensor in found.items() if bool(tensor.any())}
    if not kept:
        return None
    scale, matrix = kept.get(SCALE), kept.get(MATRIX)
    vectors = Effect(scale=None if scale is None else 1 + scale, shift=kept.get(SHIFT))
    if matrix is None:
        return vectors
    if plan.rank is not None and plan.rank * sum(matrix.shape) < matrix.numel():
        near = truncated(matrix, plan.rank)
        residual.modules[module] = {"rank": near.rank, "energy": near.residual_energy}
        residual.lost, residual.whole = residual.lost + near.lost, residual.whole + near.energy
        return vectors.then(Effect(A=near.A, B=near.B))
    return vectors.then(Effect(dense=matrix)).compact()
