"""A version as REST shows it."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator
from sqlalchemy import Connection

from app.edits.schemas import Guards
from app.schemas import ListOf, Message, Name, Request
from registry import signatures, versions
from registry.signatures import Signed
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


class SignatureBody(BaseModel):
    """A signature of a version's manifest, by Ed25519 in base64."""

    keyid: str
    sig: str
    trusted: bool = Field(description="It is right, and its key is among ERRATA_TRUSTED_KEYS.")
    created_at: int


class DsseSignature(Request):
    keyid: str = Field(max_length=64)
    sig: str = Field(max_length=128)


class Envelope(Request):
    """A DSSE envelope: the manifest's bytes, in base64, and who signed them."""

    payloadType: str = Field(max_length=128)  # noqa: N815
    payload: str
    signatures: list[DsseSignature] = Field(max_length=64)


class VersionBody(BaseModel):
    id: str
    object: Literal["version"] = "version"
    base: BaseBody
    stack: list[str]
    parents: list[str]
    recipe: dict[str, Any]
    reports: list[dict[str, Any]]
    signatures: list[SignatureBody]
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
        signatures=[
            signature_body(signed)
            for signed in signatures.list_signatures(connection, version.tenant, manifest)
        ],
        status=version.status,
        created_at=int(version.created_at),
    )


def signature_body(signed: Signed) -> SignatureBody:
    return SignatureBody(
        **signed.signature.to_json(), trusted=signed.trusted, created_at=int(signed.created_at)
    )
