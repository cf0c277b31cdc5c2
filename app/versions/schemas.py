"""A version as REST shows it."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator
from sqlalchemy import Connection

from app.edits.schemas import Guards
from app.schemas import ListOf, Message, Name, Request
from registry import versions
from registry.versions import Version


class ExportOptions(Request):
    """A format, and for ``peft`` how many ranks."""

    format: Literal["peft", "huggingface", "errata"] = Field(
        description="A PEFT LoRA adapter; a whole model with the changes in it; or an archive from"
        " which another service restores the version."
    )
    rank: int = Field(
        512, ge=1, le=512, description="peft: the most that a module gets; no more than it needs."
    )
    round_rank: bool = Field(
        True, description="peft: pad to a rank that vLLM takes (1, 8, 16, 32, 64, …)."
    )

    @model_validator(mode="after")
    def _ranked(self) -> Self:
        given = self.model_fields_set & {"rank", "round_rank"}
        if given and self.format != "peft":
            raise ValueError(f"{' and '.join(sorted(given))} goes with format peft; leave it out")
        return self


class ImportVersion(Request):
    """An archive that was uploaded with purpose ``archive``."""

    file: Name
    base: Name | None = Field(
        None, description="The base that an adapter is of; may be left out where there is one."
    )
    parent: Name | None = Field(
        None, description="The version that an adapter comes on top of; by default the base."
    )
    label: Message | None = None
    guards: Guards = Guards()


class BaseBody(BaseModel):
    name: str
    digest: str


class VersionBody(BaseModel):
    id: str
    object: Literal["version"] = "version"
    base: BaseBody
    stack: list[str]
    parents: list[str]
    recipe: dict[str, Any]
    reports: list[dict[str, Any]]
    status: Literal["ready", "rejected", "deleted"]
    created_at: int


class Edge(BaseModel):
    version: str
    parent: str


class Lineage(ListOf[VersionBody]):
    """The graph of a version's ancestors: every version before its parents."""

    edges: list[Edge] = Field(description="One for each parent of each version.")


def version_body(connection: Connection, version: Version) -> VersionBody:
    manifest = version.manifest
    return VersionBody(
        id=version.id,
        base=BaseBody(name=manifest.base.name, digest=manifest.base.digest),
        stack=list(manifest.stack),
        parents=list(manifest.parents),
        recipe=dict(manifest.recipe),
        reports=list(versions.reports(connection, version.tenant, version.id)),
        status=version.status,
        created_at=int(version.created_at),
    )
