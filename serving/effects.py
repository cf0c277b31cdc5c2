"""Apply versions' effects to their own rows of a module's output, by forward hooks.

Rows stand in the order of versions, so each version's are one slice. A product of a few rows is
computed over a window of at least ``min_rows`` rows, whose other rows are dropped: a row's bits
then do not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from editing.deltas import Effect

#: Rows of one version in a step: stack digest, first row, row after the last.
Extent = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Slice:
    """An effect, its rows, and the window of rows its products see."""

    effect: Effect
    start: int
    stop: int
    first: int
    last: int


class EffectHooks:
    """Puts hooks on the modules that a step's versions touch, and takes them off again."""

    def __init__(self, model: PreTrainedModel, min_rows: int) -> None:
        self._modules = dict(model.named_modules())
        self._head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._min_rows = min_rows
        self._layout: tuple[object, ...] = ()
        self._handles: list[RemovableHandle] = []

    def arrange(
        self,
        rows: tuple[Extent, ...],
        head_rows: tuple[Extent, ...],
        effects: Mapping[str, Mapping[str, Effect]],
    ) -> None:
        """Make the hooks fit a step: which rows are whose, and what each version does.

        Args:
            rows: extents in the flat row.
            head_rows: extents in the rows that the lm_head sees.
            effects: by stack digest, composed effects by module path.
        """
        layout = (rows, head_rows)
        if layout == self._layout:
            return
        self.clear()
        slices: dict[str, list[Slice]] = {}
        for version in dict.fromkeys(extent[0] for extent in rows):
            for path, effect in effects[version].items():
                extents = head_rows if self._modules[path] is self._head else rows
                slices.setdefault(path, []).extend(
                    self._slice(effect, extent, extents[-1][2])
                    for extent in extents
                    if extent[0] == version
                )
        for path, own in slices.items():
            hook = partial(_add_effects, tuple(own))
            self._handles.append(self._modules[path].register_forward_hook(hook))
        self._layout = layout

    def clear(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._layout = ()

    def _slice(self, effect: Effect, extent: Extent, rows: int) -> Slice:
        _, start, stop = extent
        total = max(rows, self._min_rows)  # the row is padded to that
        first = max(0, min(start, total - self._min_rows))
        return Slice(effect, start, stop, first, max(stop, first + self._min_rows))


def _add_effects(
    slices: tuple[Slice, ...], module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    x, y = inputs[0][0], output[0]
    apply = _embedding_effect if isinstance(module, nn.Embedding) else Effect.apply
    for part in slices:
        seen = slice(part.first, part.last)
        changed = apply(part.effect, x[seen], y[seen])
        y[part.start : part.stop] = changed[part.start - part.first : part.stop - part.first]


def _embedding_effect(effect: Effect, ids: Tensor, y: Tensor) -> Tensor:
    """The effect where x is the one-hot form of ids [n]: A and D give their columns."""
    out = replace(effect, A=None, B=None, dense=None).apply(y, y.float())
    if effect.A is not None and effect.B is not None:
        out = out + F.linear(effect.A.T[ids], effect.B)
    if effect.dense is not None:
        out = out + effect.dense.T[ids]
    return out.to(y.dtype)


def padded(effect: Effect) -> Effect:
    """The same effect without rank 1: a product of one column has bits of its own.

    A zero row in A and a zero column in B add exact zeros.
    """
    if effect.A is None or effect.B is None or effect.rank != 1:
        return effect
    return replace(effect, A=F.pad(effect.A, (0, 0, 0, 1)), B=F.pad(effect.B, (0, 1)))


def check_effects(model: PreTrainedModel, effects: Mapping[str, Effect]) -> None:
    """Check that every effect fits the module it names.

    Raises:
        ValueError: says which does not, and why.
    """
    modules = dict(model.named_modules())
    for path, effect in effects.items():
        shape = _shape(path, modules.get(path), model.config.hidden_size)
        if shape is None:
            raise ValueError(f"the base has no linear, norm, embedding or MLP called {path!r}")
        in_features, out_features = shape
        expected = {
            "scale": (out_features,),
            "shift": (out_features,),
            "A": (effect.rank, in_features),
            "B": (out_features, effect.rank),
            "dense": (out_features, in_features),
        }
        for part, tensor in effect.parts().items():
            if part not in expected:
                raise ValueError(f"{path!r}: this engine serves no effect with {part!r}")
            if tuple(tensor.shape) != expected[part]:
                raise ValueError(
                    f"{path!r}: {part} is {tuple(tensor.shape)}, the base needs {expected[part]}"
                )


def _shape(path: str, module: nn.Module | None, hidden: int) -> tuple[int, int] | None:
    """Inputs and outputs of a module that an effect may touch."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if module is not None and path.rpartition(".")[2] == "mlp":
        return hidden, hidden
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 1:
        return weight.numel(), weight.numel()
    return None
