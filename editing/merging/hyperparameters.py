"""Hyperparameters of each way to merge, as requests give them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Density = Annotated[float, Field(gt=0, le=1)]


class MergeHyperparameters(BaseModel):
    """What every way has. Checked, frozen, and closed to unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    scale: float = Field(
        1.0, ge=-100, le=100, description="What the merged change is multiplied by at the end."
    )


class ElectHyperparameters(MergeHyperparameters):
    """Of methods that elect a sign for every entry and take the changes that agree with it.

    mergekit elects on weighted changes and divides by the agreeing weights, peft elects before
    weighting and divides by how many agree.
    """

    elect_on: Literal["weighted", "changes"] = Field(
        "weighted",
        description="Signs are elected on the weighted changes, or on those as they are.",
    )
    majority: Literal["sum", "count"] = Field(
        "sum", description="The elected sign is that of the sum, or that which more have."
    )
    divide_by: Literal["weights", "count", "none"] = Field(
        "weights", description="What the agreeing changes' sum is divided by, of those that agree."
    )


class TiesHyperparameters(ElectHyperparameters):
    """TIES's choices."""

    density: Density = Field(
        0.2, description="Share of a tensor's entries that is kept, the largest."
    )


class DareHyperparameters(MergeHyperparameters):
    """DARE's choices."""

    density: Density = Field(0.5, description="Probability that an entry is kept.")
    rescale: bool = Field(True, description="Divide what is kept by the density.")


class DareTiesHyperparameters(ElectHyperparameters, DareHyperparameters):
    """DARE's and TIES's."""

    divide_by: Literal["weights", "count", "none"] = Field(
        "none", description="What the agreeing changes' sum is divided by, of those that agree."
    )


class DellaLinearHyperparameters(DareHyperparameters):
    """DELLA's choices: entries are kept with probabilities from density − epsilon to density +
    epsilon, rising with their rank in their row."""

    epsilon: float = Field(0.1, ge=0, lt=0.5, description="Half the width of the probabilities.")

    @model_validator(mode="after")
    def _probabilities(self) -> Self:
        if self.density - self.epsilon <= 0 or self.density + self.epsilon > 1:
            raise ValueError(
                f"density - epsilon must be above 0 and density + epsilon at most 1; they are"
                f" {self.density - self.epsilon:g} and {self.density + self.epsilon:g}"
            )
        return self


class DellaHyperparameters(DareTiesHyperparameters, DellaLinearHyperparameters):
    """DELLA's and TIES's."""


class BreadcrumbsHyperparameters(MergeHyperparameters):
    """Model breadcrumbs' choices."""

    density: Density = Field(0.9, description="Share of a tensor's entries that is kept.")
    gamma: float = Field(
        0.01, ge=0, lt=1, description="Share of the largest entries that is left out."
    )


class PcbHyperparameters(MergeHyperparameters):
    """PCB-Merging's choices."""

    ratio: float = Field(
        0.1, gt=0, le=1, description="Share of a task's entries that is kept, by their score."
    )


class MosHyperparameters(MergeHyperparameters):
    """Of the average of a new version with the old ones."""

    alpha: float = Field(0.5, ge=0, le=1, description="Weight of the old versions' mean.")
