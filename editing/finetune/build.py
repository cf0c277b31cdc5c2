"""An adapter for a model from hyperparameters: one function for each way to fine-tune."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft

from editing.deltas import Effect
from editing.finetune import hyperparameters as h
from editing.finetune import library
from editing.finetune.adapter import Adapter, layer_of, linears, norms
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


def lora(view: ModelView, chosen: h.LoraHyperparameters, seed: int) -> Adapter:
    config = _config(
        peft.LoraConfig, r=chosen.r, lora_alpha=chosen.lora_alpha, use_rslora=chosen.use_rslora
    )
    made = _library(view, chosen, seed, config, library.low_rank)
    return library.LayerDropping(made, seed) if chosen.layer_dropping else made


def dora(view: ModelView, chosen: h.DoraHyperparameters, seed: int) -> Adapter:
    config = _config(peft.LoraConfig, r=chosen.r, lora_alpha=chosen.lora_alpha, use_dora=True)
    return _library(view, chosen, seed, config, library.low_rank)


def ia3(view: ModelView, chosen: h.Ia3Hyperparameters, seed: int) -> Adapter:
    config = _config(peft.IA3Config, feedforward_modules=[])
    return _library(view, chosen, seed, config, library.scaled)


def loha(view: ModelView, chosen: h.RankHyperparameters, seed: int) -> Adapter:
    return _library(view, chosen, seed, _config(peft.LoHaConfig, r=chosen.r), library.dense)


def lokr(view: ModelView, chosen: h.RankHyperparameters, seed: int) -> Adapter:
    return _library(view, chosen, seed, _config(peft.LoKrConfig, r=chosen.r), library.dense)


def hira(view: ModelView, chosen: h.RankHyperparameters, seed: int) -> Adapter:
    return _library(view, chosen, seed, _config(peft.HiraConfig, r=chosen.r), library.dense)


def shira(view: ModelView, chosen: h.ShiraHyperparameters, seed: int) -> Adapter:
    config = _config(peft.ShiraConfig, r=chosen.r, random_seed=seed)
    return _library(view, chosen, seed, config, library.scattered)


def vera(view: ModelView, chosen: h.VeraHyperparameters, seed: int) -> Adapter:
    config = _config(peft.VeraConfig, r=chosen.r, projection_prng_key=seed)
    return _library(view, chosen, seed, config, library.shared)


def randlora(view: ModelView, chosen: h.RandLoraHyperparameters, seed: int) -> Adapter:
    config = _config(peft.RandLoraConfig, r=chosen.r, projection_prng_key=seed)
    return _library(view, chosen, seed, config, library.dense)


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
