"""A version as REST shows it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field
from sqlalchemy import Connection

from app.schemas import ListOf
from registry import versions
from registry.versions import Version


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
