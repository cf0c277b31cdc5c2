"""What is to be done with a version's history, and how two versions differ."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, model_validator

from app.edits.schemas import Guards
from app.schemas import Message, Name, Request

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
VersionName = Annotated[str, Field(pattern=r"^ver_[0-9a-f]{40}$")]


class Flatten(Request):
    endpoint: Name | None = Field(
        None, description="An endpoint that is all at this version, and moves to the result."
    )
    activate: bool = Field(True, description="Move the endpoint to the result.")
    message: Message | None = None


class Revert(Flatten):
    """Exactly one of ``delta`` and ``version``."""

    delta: Digest | None = Field(None, description="What is taken out, by its digest.")
    version: VersionName | None = Field(
        None, description="The ancestor whose work is taken out, in the delta's place."
    )
    replay: bool = Field(
        False, description="Make what came later anew without it, by running its recipes again."
    )
    guards: Guards = Guards()

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.delta is None) == (self.version is None):
            raise ValueError("give exactly one of delta and version")
        return self


class Replay(Request):
    base: Name = Field(description="The base that the endpoint's recipes run again on.")
    onto: Name = Field(
        description="The endpoint whose head they build on; it is made, at the base itself, where"
        " there is none."
    )
    activate: bool = Field(False, description="Move that endpoint to the result.")
    guards: Guards = Guards()
    message: Message | None = None


class DiffFile(Request):
    against: VersionName
    file: Name = Field(description="A file of facts, edits or texts.")


class ModuleBody(BaseModel):
    module: str
    kinds: list[str] = Field(description="scale, shift, low_rank, dense, sparse, gated")
    rank: int
    shape: tuple[int | None, int | None] = Field(description="[out, in]")
    norm: float | None = Field(description="‖B A + D‖, Frobenius; null where there is neither.")


class DeltaBody(BaseModel):
    digest: str
    method: str
    versions: list[str] = Field(description="The versions whose work is in it.")
    modules: list[ModuleBody]


class EditLine(BaseModel):
    edit: str
    version: str
    prompt: str
    subject: str | None
    target_new: str | None
    redirect_to: str | None


class EditLines(BaseModel):
    count: int
    data: list[EditLine] = Field(description="The first thousand.")


class DiffBody(BaseModel):
    object: Literal["diff"] = "diff"
    version: str
    against: str
    same_base: bool
    common: list[str] = Field(description="The deltas with which both stacks begin.")
    version_only: list[DeltaBody]
    against_only: list[DeltaBody]
    edits_version_only: EditLines
    edits_against_only: EditLines
