"""Bodies of ``/v1/keys``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from app.schemas import Name, Request
from registry.keys import Key

Limit = Annotated[int, Field(ge=1, le=1_000_000_000)]
KeyScope = Literal["infer", "edit", "admin"]


class CreateKey(Request):
    """A key of the caller's tenant."""

    name: Name = Field(description="Whom histories show.")
    scopes: Annotated[list[KeyScope], Field(min_length=1, max_length=3)]
    expires_in: int | None = Field(
        None, ge=1, le=10 * 365 * 86400, description="Seconds from now; without it, never."
    )
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = Field(
        None, description="Of prompts and completions; the one that goes beyond is answered whole."
    )


class KeyBody(BaseModel):
    id: str
    object: Literal["key"] = "key"
    name: str
    tenant: str
    scopes: list[str]
    status: str
    requests_per_minute: int | None
    tokens_per_minute: int | None
    created_at: float
    expires_at: float | None
    revoked_at: float | None


class NewKeyBody(KeyBody):
    """With the key itself, which is shown this once."""

    key: str


def key_body(key: Key) -> KeyBody:
    return KeyBody(
        id=key.id,
        name=key.name,
        tenant=key.tenant,
        scopes=sorted(key.scopes),
        status=key.status,
        requests_per_minute=key.requests_per_minute,
        tokens_per_minute=key.tokens_per_minute,
        created_at=key.created_at,
        expires_at=key.expires_at,
        revoked_at=key.revoked_at,
    )
