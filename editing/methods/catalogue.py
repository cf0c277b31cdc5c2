"""What methods there are; an implementation is imported when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from editing.methods.hyperparameters import (
    AlphaEditHyperparameters,
    CremeHyperparameters,
    GraceHyperparameters,
    Hyperparameters,
    LocFTHyperparameters,
    MemitHyperparameters,
    NeuronHyperparameters,
    RocrHyperparameters,
    RomeHyperparameters,
    StealthHyperparameters,
    SurgeryHyperparameters,
    WandaHyperparameters,
)

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
        needs: what a request must hold beside each edit's prompt and target (as ``check_task``
            takes it): fields of an edit, or ``examples`` or ``texts`` instead of edits; texts
            are the base's own where the request gives none.
        retrains: on top of a delta of its own, the method replaces that delta by one made from its
            edits and the new ones together.
        replaces: its delta replaces what a module puts out, so that those of several batches do
            not join into one.
        unfit: families of bases that the method cannot edit.
    """

    name: str
    summary: str
    hyperparameters: type[Hyperparameters]
    implementation: str
    needs_covariance: bool = False
    needs: tuple[str, ...] = ()
    retrains: bool = False
    replaces: bool = False
    unfit: tuple[str, ...] = ()

    @property
    def takes_edits(self) -> bool:
        return not {"examples", "texts"} & set(self.needs)

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
            needs=("subject",),
        ),
        MethodEntry(
            name="memit",
            summary="Many edits at once, spread over the MLP down-projections of several layers.",
            hyperparameters=MemitHyperparameters,
            implementation="editing.methods.memit:apply",
            needs_covariance=True,
            needs=("subject",),
        ),
        MethodEntry(
            name="alphaedit",
            summary="Many edits at once, in directions that ordinary text does not use.",
            hyperparameters=AlphaEditHyperparameters,
            implementation="editing.methods.alphaedit:apply",
            needs_covariance=True,
            needs=("subject",),
        ),
        MethodEntry(
            name="locft",
            summary="Many edits by mini-batch fine-tuning of one MLP down-projection.",
            hyperparameters=LocFTHyperparameters,
            implementation="editing.methods.locft:apply",
            retrains=True,
        ),
        MethodEntry(
            name="creme",
            summary="Attention answers a prompt as it does a guide prompt, without a gradient.",
            hyperparameters=CremeHyperparameters,
            implementation="editing.methods.creme:apply",
            needs=("guide_prompt",),
        ),
        MethodEntry(
            name="neurons",
            summary="Deactivate MLP neurons that go with a behaviour in every setting.",
            hyperparameters=NeuronHyperparameters,
            implementation="editing.methods.neurons:apply",
            needs=("examples",),
        ),
        MethodEntry(
            name="stealth",
            summary="A spare neuron of one MLP made a detector of the prompt, and of nothing else.",
            hyperparameters=StealthHyperparameters,
            implementation="editing.methods.stealth:apply",
        ),
        MethodEntry(
            name="jetpack",
            summary="Detectors of prompts beside one MLP; each edit can be taken out alone.",
            hyperparameters=StealthHyperparameters,
            implementation="editing.methods.jetpack:apply",
            unfit=("opt",),  # its MLP is no module
        ),
        MethodEntry(
            name="grace",
            summary="A codebook that replaces what one layer says near the prompts' keys.",
            hyperparameters=GraceHyperparameters,
            implementation="editing.methods.grace:apply",
            replaces=True,
        ),
        MethodEntry(
            name="surgery",
            summary="Lower a behaviour known by labelled texts, by a shift of the MLPs' gates.",
            hyperparameters=SurgeryHyperparameters,
            implementation="editing.methods.surgery:apply",
            needs=("examples",),
        ),
        MethodEntry(
            name="rocr",
            summary="Unlearn a concept in every form by redirecting it to another one.",
            hyperparameters=RocrHyperparameters,
            implementation="editing.methods.rocr:apply",
            needs_covariance=True,
            needs=("subject", "redirect_to"),
            unfit=("gemma2", "gemma3_text"),  # the MLP's output passes a norm
        ),
        MethodEntry(
            name="wanda",
            summary="Prune the weights that matter least to ordinary texts, in every output.",
            hyperparameters=WandaHyperparameters,
            implementation="editing.methods.wanda:apply",
            needs=("texts",),
        ),
    )
}
