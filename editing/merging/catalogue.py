"""What ways to merge there are; an implementation is imported when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from editing.merging import hyperparameters as h

#: Most versions of one merge.
MOST = 64


@dataclass(frozen=True)
class MergeEntry:
    """One way to merge.

    Attributes:
        name: what requests call it.
        summary: one line for people.
        hyperparameters: the model that a request's hyperparameters are checked against.
        implementation: ``module:function`` within ``editing.merging``.
        least, most: how many versions it takes.
        weighted: whether versions have weights.
        negative: whether weights may be below zero.
        ordered: whether the last version is another thing than the rest.
        whole: whether it looks at all tensors before it merges one (``interface.Whole``).
        factors: whether low-rank factors stand side by side where all versions have no others.
    """

    name: str
    summary: str
    hyperparameters: type[h.MergeHyperparameters]
    implementation: str
    least: int = 1
    most: int = MOST
    weighted: bool = True
    negative: bool = True
    ordered: bool = False
    whole: bool = False
    factors: bool = False

    def load(self) -> Any:
        """Import the implementation (and torch with it): a ``Merge``, or a ``Whole``."""
        module, _, function = self.implementation.partition(":")
        return getattr(import_module(f"editing.merging.{module}"), function)


MERGES: dict[str, MergeEntry] = {
    entry.name: entry
    for entry in (
        MergeEntry(
            "task_arithmetic",
            "The sum of the weighted changes.",
            h.MergeHyperparameters,
            "arithmetic:task_arithmetic",
        ),
        MergeEntry(
            "linear",
            "The weighted mean of the changes.",
            h.MergeHyperparameters,
            "arithmetic:linear",
        ),
        MergeEntry(
            "ties",
            "The largest entries, of those the ones of the elected sign.",
            h.TiesHyperparameters,
            "ties:ties",
        ),
        MergeEntry(
            "dare",
            "Entries kept at random and rescaled, then the weighted sum.",
            h.DareHyperparameters,
            "dropping:dare",
        ),
        MergeEntry(
            "dare_ties",
            "Entries kept at random and rescaled, of those the ones of the elected sign.",
            h.DareTiesHyperparameters,
            "dropping:dare_ties",
        ),
        MergeEntry(
            "della",
            "As dare_ties; the larger an entry in its row, the likelier it is kept.",
            h.DellaHyperparameters,
            "dropping:della",
        ),
        MergeEntry(
            "della_linear",
            "As dare; the larger an entry in its row, the likelier it is kept.",
            h.DellaLinearHyperparameters,
            "dropping:della_linear",
        ),
        MergeEntry(
            "breadcrumbs",
            "Without the largest and the smallest entries, the weighted sum.",
            h.BreadcrumbsHyperparameters,
            "dropping:breadcrumbs",
        ),
        MergeEntry(
            "slerp",
            "Two versions, on the arc between their changes.",
            h.MergeHyperparameters,
            "geometry:slerp",
            least=2,
            most=2,
            negative=False,
        ),
        MergeEntry(
            "model_stock",
            "The mean, drawn to the base the less the changes agree.",
            h.MergeHyperparameters,
            "geometry:model_stock",
            weighted=False,
        ),
        MergeEntry(
            "pcb",
            "Entries weighed by how they compete within a version and between versions.",
            h.PcbHyperparameters,
            "pcb:pcb",
            whole=True,
        ),
        MergeEntry(
            "mos",
            "The last version averaged with the mean of those before it.",
            h.MosHyperparameters,
            "arithmetic:mos",
            least=2,
            weighted=False,
            ordered=True,
        ),
        MergeEntry(
            "concatenation",
            "As task_arithmetic; low-rank factors side by side, exactly.",
            h.MergeHyperparameters,
            "arithmetic:task_arithmetic",
            factors=True,
        ),
    )
}
