"""What ways to fine-tune there are; what builds an adapter is imported when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from editing.datasets.training import EXAMPLES, PREFERENCES, PROMPTS
from editing.finetune import hyperparameters as h
from editing.finetune.objectives.hyperparameters import DpoHyperparameters, ReMaxHyperparameters

if TYPE_CHECKING:
    from editing.finetune.adapter import Adapter
    from editing.models.view import ModelView

#: What OpenAI calls the method is the adapter that suits most.
SUPERVISED = "supervised"


@dataclass(frozen=True)
class TuningEntry:
    """One way to fine-tune.

    Attributes:
        name: what requests call it.
        summary: one line for people.
        hyperparameters: the model that a request's hyperparameters are checked against.
        builder: the function in ``editing.finetune.build`` that makes its adapter.
        rows: the kind of rows that it learns from.
    """

    name: str
    summary: str
    hyperparameters: type[h.TuningHyperparameters]
    builder: str
    rows: str = EXAMPLES

    def build(
        self, view: ModelView, hyperparameters: h.TuningHyperparameters, seed: int
    ) -> Adapter:
        """A new adapter for a model (imports torch)."""
        build: Any = import_module("editing.finetune.build")
        adapter: Adapter = getattr(build, self.builder)(view, hyperparameters, seed)
        if hyperparameters.ema:
            adapter = build.Averaged(adapter)
        return adapter


TUNINGS: dict[str, TuningEntry] = {
    name: TuningEntry(name, summary, hyperparameters, builder or name)
    for name, builder, summary, hyperparameters in (
        (SUPERVISED, "lora", "LoRA on every linear of the layers.", h.LoraHyperparameters),
        ("lora", "", "Low-rank factors beside linears.", h.LoraHyperparameters),
        ("dora", "", "LoRA with the rows' lengths trained apart.", h.DoraHyperparameters),
        ("ia3", "", "A scale for each output of linears.", h.Ia3Hyperparameters),
        ("beft", "", "A shift for each output of linears.", h.BeftHyperparameters),
        ("loha", "", "Products of two low-rank matrices.", h.LohaHyperparameters),
        ("lokr", "", "Kronecker products.", h.LokrHyperparameters),
        ("hira", "", "The weight times a low-rank matrix, by entry.", h.HiraHyperparameters),
        ("hut", "hira", "As far as HUT's abstract goes: hira.", h.HiraHyperparameters),
        ("vera", "", "Vectors around shared random factors.", h.VeraHyperparameters),
        ("randlora", "", "Vectors around random bases.", h.RandLoraHyperparameters),
        ("delora", "", "Low-rank factors of bounded length.", h.BoundedHyperparameters),
        ("gralora", "", "Low-rank factors of blocks.", h.GraloraHyperparameters),
        ("peanut", "", "Low-rank functions of the weight.", h.RankHyperparameters),
        ("glora", "", "Low-rank factors on weights and on shifts.", h.GloraHyperparameters),
        ("deft", "", "A subspace of the weight replaced.", h.RankHyperparameters),
        ("miss", "", "Shards that share one matrix.", h.RankHyperparameters),
        ("c3a", "", "Circular convolutions.", h.BlockHyperparameters),
        ("fourierft", "", "Few Fourier coefficients.", h.FourierHyperparameters),
        ("waveft", "", "Few wavelet coefficients.", h.WaveletHyperparameters),
        ("tinylora", "", "Few numbers around a frozen SVD.", h.TinyLoraHyperparameters),
        ("osf", "", "All but the top singular directions.", h.OsfHyperparameters),
        ("oft", "", "Rotations of blocks of inputs.", h.OftHyperparameters),
        ("boft", "", "Butterflies of rotations of inputs.", h.BoftHyperparameters),
        ("hra", "", "Reflections of inputs.", h.BoundedHyperparameters),
        ("psoft", "", "A rotation between principal factors.", h.PsoftHyperparameters),
        ("road", "", "Rotations of pairs of outputs.", h.RoadHyperparameters),
        ("shira", "", "Few entries at random places.", h.ShiraHyperparameters),
        ("supertuning", "", "The largest weights.", h.SupertuningHyperparameters),
        ("compacter", "", "A bottleneck of neurons beside MLPs.", h.CompacterHyperparameters),
        ("ln_tuning", "", "The norms' weights and biases.", h.NormHyperparameters),
        ("ssf", "", "A scale and a shift after every operation.", h.NormHyperparameters),
        ("full", "", "Every entry of the linears.", h.FullHyperparameters),
        ("hft", "", "As full, half standing still by turns.", h.HftHyperparameters),
        ("spiel", "", "Few entries, of which some move on the way.", h.SpielHyperparameters),
        ("sara", "", "The smallest weights.", h.SaraHyperparameters),
        ("mask", "", "Which weights there are.", h.MaskHyperparameters),
        ("said", "", "One short vector that moves all linears.", h.SaidHyperparameters),
        ("lofit", "", "Offsets of few attention heads' outputs.", h.LofitHyperparameters),
    )
} | {
    "dpo": TuningEntry("dpo", "LoRA from preferences.", DpoHyperparameters, "lora", PREFERENCES),
    "remax": TuningEntry("remax", "LoRA from rewards.", ReMaxHyperparameters, "lora", PROMPTS),
}

#: What ways tune that are not of linears: they take no ``target_modules``.
OWN_PLACES: dict[str, str] = {
    "compacter": "a bottleneck beside every MLP",
    "ln_tuning": "every norm",
    "lofit": "the attention heads that it chooses",
}

_TOKENS = "puts trained vectors before a text, which is no change of a module: no delta can hold it"
_ROUTED = "chooses among its matrices by the input, which no delta's effect does"
_AWAY = "begins at random, away from the version that is to be tuned"
#: Ways that people may ask for, and why they are not offered. peft's others are all in ``TUNINGS``.
REFUSED: dict[str, str] = {
    "prompt_tuning": _TOKENS,
    "multitask_prompt_tuning": _TOKENS,
    "p_tuning": _TOKENS,
    "prefix_tuning": _TOKENS,
    "cpt": _TOKENS,
    "cartridge": _TOKENS,
    "adaption_prompt": _TOKENS,
    "lily": _ROUTED,
    "poly": _ROUTED,
    "xlora": _ROUTED,
    "vblora": _AWAY,
    "unilora": _AWAY,
    "pvera": "draws its factors anew at every input, and what is served must be one model",
    "adalora": "takes ranks away on the way by rules of its own; lora with a smaller r is near it",
    "adamss": "needs scikit-learn, which is not among this service's dependencies",
    "frod": "decomposes the weights of all layers jointly, for which each must be in memory twice",
    "shadow": "runs a second network beside the model, which is no change of a module",
    "trainable_tokens": "changes embeddings, and tuning here changes linears and norms",
    "meft": "makes the network reversible, which is another architecture than the base's",
    "ema": 'is an option of every method: give "ema": true among the hyperparameters of another',
    "copra": 'is an option of lora: give "layer_dropping": true among its hyperparameters',
}
