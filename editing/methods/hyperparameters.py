"""Hyperparameters of each method, as requests give them."""

from __future__ import annotations

from abc import ABC, abstractmethod

from pydantic import BaseModel, ConfigDict, Field


class Hyperparameters(BaseModel, ABC):
    """Checked, frozen, and closed to unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @abstractmethod
    def edited_layers(self, depth: int) -> tuple[int, ...]:
        """The layers that the method changes in a model of ``depth`` layers."""


class RomeHyperparameters(Hyperparameters):
    """ROME's choices. Lengths are relative to ‖v‖, so that they fit any layer of any model."""

    layer: int | None = Field(
        None, ge=0, description="Layer whose MLP is edited; by default a seventh of the depth."
    )
    steps: int = Field(50, ge=1, le=1000, description="Most optimiser steps for one edit.")
    learning_rate: float = Field(
        0.3, gt=0, le=10, description="Length of an optimiser step, as a share of ‖v‖."
    )
    stop_loss: float = Field(
        0.35,
        gt=0,
        description="The edit is done once no target token's loss is above, in any context.",
    )
    clamp: float = Field(20.0, gt=0, description="Most that ‖δ‖ may be, in units of ‖v‖.")
    decay: float = Field(0.01, ge=0, description="Weight of ‖δ‖/‖v‖ in the loss.")
    kl_factor: float = Field(
        1.0, ge=0, description="Weight of the divergence on the subject's other texts, at first."
    )
    essence_texts: int = Field(
        24, ge=0, le=256, description="Texts about the subject, sampled from the model, to keep."
    )
    essence_tokens: int = Field(32, ge=1, le=512, description="Most tokens of such a text.")
    wordings: int = Field(
        4,
        ge=0,
        le=64,
        description="Most other wordings of the fact, found in such texts, that must say it too.",
    )
    prefixes: int = Field(
        3, ge=0, le=64, description="Contexts in which the target is optimised, besides none."
    )
    ridge: float = Field(
        1e-4, ge=0, le=1, description="Added to C's diagonal, as a share of its mean."
    )
    lookalike_weight: float = Field(
        0.01,
        ge=0,
        le=10,
        description="Weight in C of names that end in the same token as the subject; 0: none more.",
    )
    seed: int = Field(0, ge=0, description="Decides which texts are sampled.")

    def edited_layers(self, depth: int) -> tuple[int, ...]:
        return (depth // 7 if self.layer is None else self.layer,)
