"""What fine-tuning trains: parameters, and the effects that they stand for.

While it is trained an adapter's effects are hooked into the model as a delta's are, so that what is
trained is what will be served, on whatever stack is beneath.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from editing.deltas import Effect
from editing.models.view import ModelView
from registry.errors import InvalidRequest


class Adapter(nn.Module, ABC):
    """The parameters that require gradients are trained; ``state_dict`` is all that a run needs to
    go on with."""

    @abstractmethod
    def effects(self) -> dict[str, Effect]:
        """By module path, in fp32; differentiable."""

    def penalty(self) -> Tensor | float:
        """Added to the loss of every step."""
        return 0.0

    def before_step(self, step: int, total: int) -> None:
        """Called before the gradients of a step are computed."""

    def after_backward(self, step: int, total: int) -> None:
        """Called once they are there, before the optimiser moves."""

    def after_step(self) -> None:
        """Called once the optimiser has moved."""

    def kept(self) -> dict[str, Tensor]:
        """The buffers that a run changes."""
        return dict(self.named_buffers(recurse=False))

    def steady(self) -> list[nn.Parameter]:
        """Those that weight decay leaves alone: at 0 they are not what the version is, as a scale.

        With these as they begin and all others at 0 the adapter stands for nothing.
        """
        return []

    def trainable(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def linears(view: ModelView, targets: Sequence[str] | None = None) -> list[str]:
    """Paths of the linears in the model's layers, from below.

    Args:
        targets: last names to choose (``q_proj``); by default all.

    Raises:
        InvalidRequest: no linear has one of the names.
    """
    found = [
        f"{view.paths.layers}.{name}"
        for name, module in view.layers.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    return _chosen(view, found, targets)


def norms(view: ModelView) -> list[str]:
    """Paths of the norms in the model's layers and after them."""
    inside = [
        f"{view.paths.layers}.{name}"
        for name, module in view.layers.named_modules()
        if _is_norm(module)
    ]
    last = [path for path in view.paths.last if _has(view, path) and _is_norm(view.module(path))]
    return [*inside, *last]


def width(view: ModelView, path: str) -> int:
    """How many numbers a module puts out for a token."""
    module = view.module(path)
    if isinstance(module, (nn.Linear, Conv1D)):
        return view.weight(path).shape[0]
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise InvalidRequest(f"{path} has no weight")
    return weight.shape[0]


def layer_of(view: ModelView, path: str) -> int:
    """The layer that a module is in."""
    return int(path.removeprefix(f"{view.paths.layers}.").partition(".")[0])


def _chosen(view: ModelView, found: Sequence[str], targets: Sequence[str] | None) -> list[str]:
    if targets is None:
        return list(found)
    names = dict.fromkeys(path.rpartition(".")[2] for path in found)
    for target in targets:
        if target not in names:
            raise InvalidRequest(
                f"target_modules: base {view.base.name!r} has no linear {target!r} in its layers;"
                f" there are {', '.join(names)}",
                param="hyperparameters.target_modules",
            )
    return [path for path in found if path.rpartition(".")[2] in targets]


def _is_norm(module: nn.Module) -> bool:
    return not list(module.children()) and type(module).__name__.endswith("Norm")


def _has(view: ModelView, path: str) -> bool:
    try:
        view.module(path)
    except AttributeError:
        return False
    return True
