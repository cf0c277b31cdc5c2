"""``/v1/keys``: the keys of the caller's tenant. ``errata keys`` makes those of any."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import Query, status

from app.keys.schemas import CreateKey, KeyBody, NewKeyBody, key_body
from app.schemas import Limit, ListOf, Name
from app.services import CallerDep, ServicesDep
from app.strict import Router
from registry import keys

router = Router(prefix="/v1/keys", tags=["keys"])


@router.post("", status_code=status.HTTP_201_CREATED)
def create_key(body: CreateKey, services: ServicesDep, caller: CallerDep) -> NewKeyBody:
    """Make a key. The answer is the only one that shows it."""
    expires_at = None if body.expires_in is None else time.time() + body.expires_in
    with services.database.write() as connection:
        key, token = keys.create_key(
            connection,
            caller.tenant,
            body.name,
            set(body.scopes),
            actor=caller.actor,
            expires_at=expires_at,
            requests_per_minute=body.requests_per_minute,
            tokens_per_minute=body.tokens_per_minute,
        )
    return NewKeyBody(**key_body(key).model_dump(), key=token)


@router.get("")
def list_keys(
    services: ServicesDep,
    caller: CallerDep,
    after: Annotated[str | None, Query(description="The last id of the page before.")] = None,
    limit: Limit = 20,
) -> ListOf[KeyBody]:
    """Keys, newest first; never the keys themselves."""
    with services.database.read() as connection:
        page = keys.list_keys(connection, caller.tenant, after=after, limit=limit)
    return ListOf(data=[key_body(key) for key in page.items], has_more=page.has_more)


@router.delete("/{key_id}")
def revoke_key(key_id: Name, services: ServicesDep, caller: CallerDep) -> KeyBody:
    """Refuse a key from the next request on. It stays listed."""
    with services.database.write() as connection:
        return key_body(keys.revoke_key(connection, caller.tenant, key_id, actor=caller.actor))
