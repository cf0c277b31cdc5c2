"""Endpoints, moves and live edits as REST shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from app.schemas import Message, Name, Request
from registry.endpoints import Endpoint
from registry.moves import Move, State, Target
from registry.versions import Version


class TargetBody(Request):
    version: Name
    weight: float = Field(1.0, gt=0, le=1_000_000, allow_inf_nan=False)


class PutEndpoint(Request):
    """Exactly one of ``version`` and ``split``."""

    version: Name | None = None
    split: list[TargetBody] | None = Field(None, min_length=1, max_length=16)
    force: bool = Field(
        False,
        description="Point at versions that a guard rejected (scope admin): they become ready, and"
        " who did so and why stays among their reports.",
    )
    message: Message | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.version is None) == (self.split is None):
            raise ValueError("give exactly one of version and split")
        if self.split and len({t.version for t in self.split}) != len(self.split):
            raise ValueError("split names a version twice")
        return self

    @property
    def state(self) -> State:
        if self.version is not None:
            return (Target(self.version),)
        return tuple(Target(t.version, t.weight) for t in self.split or ())


class PromoteBody(Request):
    version: Name | None = Field(
        None, description="Which of the split's versions; the last (the canary) by default."
    )
    message: Message | None = None


class RollbackBody(Request):
    """At most one of ``steps``, ``to`` and ``to_generation``; one step by default."""

    steps: int | None = Field(None, ge=1, le=10_000)
    to: Name | None = Field(None, description="A version that the endpoint was all at earlier.")
    to_generation: int | None = Field(None, ge=1, le=2**31 - 1)
    message: Message | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(way is not None for way in (self.steps, self.to, self.to_generation)) > 1:
            raise ValueError("give at most one of steps, to and to_generation")
        return self


class StateBody(BaseModel):
    generation: int
    split: list[TargetBody]


class EndpointBody(BaseModel):
    name: str
    object: Literal["endpoint"] = "endpoint"
    generation: int
    version: str | None = Field(description="The version, unless the endpoint is split.")
    split: list[TargetBody]
    created_at: int


class RollbackAnswer(EndpointBody):
    rolled_back_from: StateBody
    rolled_back_to: StateBody


class MoveBody(BaseModel):
    object: Literal["move"] = "move"
    generation: int
    kind: str
    before: list[TargetBody] | None
    after: list[TargetBody] | None
    restores: int | None = Field(description="The generation whose state a rollback restored.")
    job: str | None
    actor: str
    message: str | None
    created_at: int


class LiveEdit(BaseModel):
    id: str
    object: Literal["edit"] = "edit"
    subject: str | None
    prompt: str
    target_new: str | None
    target_true: str | None
    redirect_to: str | None
    version: str = Field(description="The version that brought the edit.")
    delta: str = Field(description="The delta that carries it now.")
    method: str
    job: str | None
    author: str | None
    message: str | None
    metrics: dict[str, Any] | None = Field(
        description="Of the job's edits together, as measured when they were made."
    )
    holds: bool | None = Field(
        description="Whether the newest job on the endpoint still found it to hold."
    )
    created_at: int


def split_body(state: State) -> list[TargetBody]:
    return [TargetBody(version=t.version, weight=t.weight) for t in state]


def endpoint_body(endpoint: Endpoint) -> EndpointBody:
    return EndpointBody(
        name=endpoint.name,
        generation=endpoint.generation,
        version=endpoint.state[0].version if len(endpoint.state) == 1 else None,
        split=split_body(endpoint.state),
        created_at=int(endpoint.created_at),
    )


def rollback_answer(before: Endpoint, after: Endpoint) -> RollbackAnswer:
    return RollbackAnswer(
        **endpoint_body(after).model_dump(),
        rolled_back_from=StateBody(generation=before.generation, split=split_body(before.state)),
        rolled_back_to=StateBody(generation=after.generation, split=split_body(after.state)),
    )


def move_body(move: Move) -> MoveBody:
    return MoveBody(
        generation=move.generation,
        kind=move.kind,
        before=None if move.before is None else split_body(move.before),
        after=None if move.after is None else split_body(move.after),
        restores=move.origin if move.origin != move.generation else None,
        job=move.job_id,
        actor=move.actor,
        message=move.message,
        created_at=int(move.created_at),
    )


def live_edit(
    version: Version,
    delta: str,
    place: int,
    edit: Mapping[str, Any],
    reports: Sequence[Mapping[str, Any]],
    holds: Sequence[bool] | None,
) -> LiveEdit:
    """An edit of a version's recipe, with what was measured when it was made and whether it holds.

    ``delta`` carries it now, ``place`` counts it among the version's edits, ``reports`` are that
    version's, ``holds`` its edits' in the newest measurement.
    """
    recipe = version.manifest.recipe
    measured = [report["metrics"] for report in reports if report.get("kind") == "edit"]
    return LiveEdit(
        id=f"{version.id}.{place}",
        subject=edit.get("subject"),
        prompt=edit["prompt"],
        target_new=edit.get("target_new"),
        target_true=edit.get("target_true"),
        redirect_to=edit.get("redirect_to"),
        version=version.id,
        delta=delta,
        method=recipe["method"],
        job=version.job_id,
        author=recipe["author"],
        message=recipe["message"],
        metrics=(measured[0] or {}).get("after") if measured else None,
        holds=holds[place] if holds is not None and place < len(holds) else None,
        created_at=int(version.created_at),
    )
