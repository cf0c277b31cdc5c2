"""An adapter for a model from hyperparameters: one function for each way to fine-tune."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft

from editing.deltas import Effect
from editing.finetune import hyperparameters as h
from editing.finetune import library
from editing.finetune.adapter import Adapter, layer_of, linears, norms
from editing.finetune.averaging import Averaged
from editing.finetune.compacter import Compacter
from editing.finetune.library import LibraryAdapter
from editing.finetune.matrices import (
    Grown,
    HalfFineTuning,
    Intrinsic,
    Masked,
    Matrices,
    SmallWeights,
)
from editing.finetune.vectors import HeadOffsets, ScaleShift
from editing.models.view import ModelView

__all__ = ["Averaged"]

Builder = Callable[[ModelView, Any, int], Adapter]


def lora(view: ModelView, chosen: h.LoraHyperparameters, seed: int) -> Adapter:
    config = _config(
        peft.LoraConfig, r=chosen.r, lora_alpha=chosen.lora_alpha, use_rslora=chosen.use_rslora
    )
    made = _library(view, chosen, seed, config, library.low_rank)
    return library.LayerDropping(made, seed) if chosen.layer_dropping else made


def dora(view: ModelView, chosen: h.DoraHyperparameters, seed: int) -> Adapter:
    config = _config(peft.LoraConfig, r=chosen.r, lora_alpha=chosen.lora_alpha, use_dora=True)
    return _library(view, chosen, seed, config, library.low_rank)


def _peft(
    kind: Callable[..., peft.PeftConfig],
    read: Callable[[Any], Effect],
    seeded: str | None = None,
    **settings: Any,
) -> Builder:
    """A builder of peft's adapter of one kind.

    The request's hyperparameters go to peft under their names, and the seed under ``seeded``.
    """

    def build(view: ModelView, chosen: h.TuningHyperparameters, seed: int) -> Adapter:
        own = chosen.model_dump(exclude=set(h.TuningHyperparameters.model_fields))
        drawn = {} if seeded is None else {seeded: seed}
        return _library(view, chosen, seed, _config(kind, **settings, **own, **drawn), read)

    return build


ia3 = _peft(peft.IA3Config, library.scaled, feedforward_modules=[])
beft = _peft(peft.BeftConfig, library.shifted)
loha = _peft(peft.LoHaConfig, library.dense)
lokr = _peft(peft.LoKrConfig, library.dense)
hira = _peft(peft.HiraConfig, library.hadamard)
shira = _peft(peft.ShiraConfig, library.scattered, "random_seed")
vera = _peft(peft.VeraConfig, library.shared, "projection_prng_key")
randlora = _peft(peft.RandLoraConfig, library.dense, "projection_prng_key")
delora = _peft(peft.DeloraConfig, library.dense)
gralora = _peft(peft.GraloraConfig, library.dense)
peanut = _peft(peft.PeanutConfig, library.dense)
deft = _peft(peft.DeftConfig, library.dense)
psoft = _peft(peft.PsoftConfig, library.dense)
tinylora = _peft(peft.TinyLoraConfig, library.dense)
osf = _peft(peft.OSFConfig, library.dense)
supertuning = _peft(peft.SupertuningConfig, library.dense)
fourierft = _peft(peft.FourierFTConfig, library.dense, "random_loc_seed", init_weights=True)
waveft = _peft(peft.WaveFTConfig, library.dense, "random_loc_seed")
c3a = _peft(peft.C3AConfig, library.dense, init_weights=True)
miss = _peft(peft.MissConfig, library.answered)
glora = _peft(peft.GloraConfig, library.answered)
road = _peft(peft.RoadConfig, library.answered)
oft = _peft(peft.OFTConfig, library.answered, r=0)
boft = _peft(peft.BOFTConfig, library.rotated)
hra = _peft(peft.HRAConfig, library.reflected)


def ln_tuning(view: ModelView, chosen: h.NormHyperparameters, seed: int) -> Adapter:
    return ScaleShift(view, norms(view))


def ssf(view: ModelView, chosen: h.NormHyperparameters, seed: int) -> Adapter:
    return ScaleShift(view, [*linears(view, chosen.target_modules), *norms(view)])


def full(view: ModelView, chosen: h.FullHyperparameters, seed: int) -> Adapter:
    return Matrices(view, linears(view, chosen.target_modules))


def hft(view: ModelView, chosen: h.HftHyperparameters, seed: int) -> Adapter:
    paths = linears(view, chosen.target_modules)
    groups: dict[tuple[int, str], list[int]] = {}
    for place, path in enumerate(paths):
        category = "attention" if "attn" in path or "attention" in path else "mlp"
        groups.setdefault((layer_of(view, path), category), []).append(place)
    return HalfFineTuning(view, paths, [*groups.values()], chosen.rounds, seed)


def spiel(view: ModelView, chosen: h.SpielHyperparameters, seed: int) -> Adapter:
    paths = linears(view, chosen.target_modules)
    return Grown(view, paths, chosen.density, chosen.rate, chosen.every, chosen.gathered, seed)


def sara(view: ModelView, chosen: h.SaraHyperparameters, seed: int) -> Adapter:
    paths = linears(view, chosen.target_modules)
    return SmallWeights(view, paths, chosen.share, chosen.nuclear_weight)


def mask(view: ModelView, chosen: h.MaskHyperparameters, seed: int) -> Adapter:
    return Masked(view, linears(view, chosen.target_modules))


def said(view: ModelView, chosen: h.SaidHyperparameters, seed: int) -> Adapter:
    paths = linears(view, chosen.target_modules)
    return Intrinsic(view, paths, [layer_of(view, path) for path in paths], chosen.d, seed)


def compacter(view: ModelView, chosen: h.CompacterHyperparameters, seed: int) -> Adapter:
    paths = [view.part(layer, "mlp") for layer in range(view.n_layers)]
    return Compacter(view, paths, chosen.bottleneck, chosen.n, seed)


def lofit(view: ModelView, chosen: h.LofitHyperparameters, seed: int) -> Adapter:
    paths = [view.part(layer, "o_proj") for layer in range(view.n_layers)]
    heads = int(view.model.config.num_attention_heads)
    return HeadOffsets(view, paths, heads, chosen.share, chosen.finding, chosen.l1, seed)


def _config(kind: Callable[..., peft.PeftConfig], **settings: Any) -> Callable[..., Any]:
    return lambda targets: kind(target_modules=targets, **settings)


def _library(
    view: ModelView,
    chosen: h.TuningHyperparameters,
    seed: int,
    configure: Callable[[list[str]], peft.PeftConfig],
    read: Callable[[Any], Effect],
) -> LibraryAdapter:
    return LibraryAdapter(view, linears(view, chosen.target_modules), configure, read, seed)
