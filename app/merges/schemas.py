"""A merge request."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from app.edits.schemas import Guards
from app.schemas import BEYOND, Message, Name, Request

Weight = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Layer = Annotated[int, Field(ge=0, lt=10_000)]


class MergedVersion(Request):
    """One of the versions that are merged."""

    id: Name = Field(
        description="A version's id; a base's own version is one that changes nothing."
    )
    weight: Weight = 1.0
    layer_weights: dict[Layer, Weight] = Field(
        default={},
        max_length=1000,
        json_schema_extra={"propertyNames": {"pattern": "^(0|[1-9][0-9]{0,3})$"}},
        description='By layer, {"3": 0.5}: a weight in the place of ``weight`` for its modules.',
    )
    facts: Name | None = Field(
        None, description="A file of facts, asked of the version and of the result."
    )


class CreateMerge(Request):
    """Versions of one base, and how they are merged."""

    versions: list[MergedVersion] = Field(min_length=1, max_length=64)
    method: str = Field("task_arithmetic", max_length=64)
    hyperparameters: dict[str, Any] = Field(default={}, max_length=64)
    seed: int = Field(0, ge=0, lt=BEYOND, description="Of the methods that drop at random.")
    rank: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="Most rank of a merged matrix, by truncated SVD; exact and dense by default.",
    )
    guards: Guards = Guards()
    endpoint: Name | None = Field(None, description="An endpoint on the same base.")
    activate: bool = Field(True, description="Move the endpoint to the new version.")
    message: Message | None = Field(None, description="Why; shown in the history.")

    @model_validator(mode="after")
    def _once_each(self) -> Self:
        if len({version.id for version in self.versions}) < len(self.versions):
            raise ValueError("versions names one twice; give it once, with its weight")
        return self
