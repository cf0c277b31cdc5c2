"""What methods there are; an implementation is imported when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from editing.methods.hyperparameters import Hyperparameters, RomeHyperparameters

if TYPE_CHECKING:
    from editing.methods.interface import Apply


@dataclass(frozen=True)
class MethodEntry:
    """One editing method.

    Attributes:
        name: what requests call it.
        summary: one line for people.
        hyperparameters: the model that a request's hyperparameters are checked against.
        implementation: ``module:function`` of its ``apply``.
        needs_covariance: whether C of each layer in ``hyperparameters.edited_layers(depth)`` must
            be in the resources.
    """

    name: str
    summary: str
    hyperparameters: type[Hyperparameters]
    implementation: str
    needs_covariance: bool

    def load(self) -> Apply:
        """Import the implementation (and torch with it)."""
        module, _, function = self.implementation.partition(":")
        loaded: Apply = getattr(import_module(module), function)
        return loaded


METHODS: dict[str, MethodEntry] = {
    entry.name: entry
    for entry in (
        MethodEntry(
            name="rome",
            summary="Rank-one edit of one MLP down-projection at the subject's last token.",
            hyperparameters=RomeHyperparameters,
            implementation="editing.methods.rome:apply",
            needs_covariance=True,
        ),
    )
}
