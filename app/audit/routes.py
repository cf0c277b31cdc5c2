"""``/v1/audit``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Query
from pydantic import BaseModel

from app.schemas import BEYOND, Limit, ListOf
from app.services import CallerDep, ServicesDep
from app.strict import Router
from registry import audit

router = Router(prefix="/v1/audit", tags=["audit"])
Short = Annotated[str, Query(min_length=1, max_length=64)]


class EntryBody(BaseModel):
    id: int
    object: Literal["audit.entry"] = "audit.entry"
    actor: str
    action: str
    target: str
    before: Any
    after: Any
    created_at: float


@router.get("")
def list_entries(
    services: ServicesDep,
    caller: CallerDep,
    actor: Short | None = None,
    action: Annotated[
        Short | None, Query(description="How it begins: `endpoint`, `endpoint.rollback`, `key`, …")
    ] = None,
    target: Annotated[
        Short | None, Query(description="The id or name of what was changed.")
    ] = None,
    after: Annotated[
        int | None, Query(ge=0, lt=BEYOND, description="The last id of the page before.")
    ] = None,
    limit: Limit = 20,
) -> ListOf[EntryBody]:
    """Who changed what, from what, to what; newest first."""
    with services.database.read() as connection:
        page = audit.entries(
            connection,
            caller.tenant,
            actor=actor,
            action=action,
            object=target,
            after=after,
            limit=limit,
        )
    data = [
        EntryBody(
            id=entry.seq,
            actor=entry.actor,
            action=entry.action,
            target=entry.object,
            before=entry.before,
            after=entry.after,
            created_at=entry.created_at,
        )
        for entry in page.items
    ]
    return ListOf(data=data, has_more=page.has_more)
