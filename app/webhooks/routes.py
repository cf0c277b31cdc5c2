"""``/v1/webhooks``: who is told of what, of the caller's tenant."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Response, status

from app.schemas import Limit, ListOf, Name
from app.services import CallerDep, ServicesDep
from app.strict import Router
from app.webhooks.addresses import Addresses
from app.webhooks.schemas import (
    CreateWebhook,
    DeliveryBody,
    NewWebhookBody,
    Status,
    WebhookBody,
    delivery_body,
    webhook_body,
)
from registry import deliveries, webhooks

router = Router(prefix="/v1/webhooks", tags=["webhooks"])
After = Annotated[str | None, Query(description="The last id of the page before.")]


@router.post("", status_code=status.HTTP_201_CREATED)
def create_webhook(body: CreateWebhook, services: ServicesDep, caller: CallerDep) -> NewWebhookBody:
    """Tell a URL of job ends and endpoint moves. The answer is the only one with the secret."""
    Addresses.of(services.settings).check_url(body.url)
    with services.database.write() as connection:
        webhook = webhooks.create_webhook(
            connection, caller.tenant, str(body.url), set(body.events), actor=caller.actor
        )
    return NewWebhookBody(**webhook_body(webhook).model_dump(), secret=webhook.secret)


@router.get("")
def list_webhooks(
    services: ServicesDep, caller: CallerDep, after: After = None, limit: Limit = 20
) -> ListOf[WebhookBody]:
    """Webhooks, newest first; never their secrets."""
    with services.database.read() as connection:
        page = webhooks.list_webhooks(connection, caller.tenant, after=after, limit=limit)
    return ListOf(data=[webhook_body(w) for w in page.items], has_more=page.has_more)


@router.get("/{webhook_id}")
def get_webhook(webhook_id: Name, services: ServicesDep, caller: CallerDep) -> WebhookBody:
    """One webhook, without its secret."""
    with services.database.read() as connection:
        return webhook_body(webhooks.get_webhook(connection, caller.tenant, webhook_id))


@router.delete("/{webhook_id}", status_code=status.HTTP_204_NO_CONTENT)
def delete_webhook(webhook_id: Name, services: ServicesDep, caller: CallerDep) -> Response:
    """Tell it nothing more; what waited for it is dropped."""
    with services.database.write() as connection:
        webhooks.delete_webhook(connection, caller.tenant, webhook_id, actor=caller.actor)
    return Response(status_code=status.HTTP_204_NO_CONTENT)


@router.get("/{webhook_id}/deliveries")
def list_deliveries(
    webhook_id: Name,
    services: ServicesDep,
    caller: CallerDep,
    status: Annotated[Status | None, Query(description="Only those of one status.")] = None,
    after: After = None,
    limit: Limit = 20,
) -> ListOf[DeliveryBody]:
    """What it was told or is to be told, and what came of that; newest first, for a week."""
    with services.database.read() as connection:
        webhook = webhooks.get_webhook(connection, caller.tenant, webhook_id)
        page = deliveries.list_deliveries(
            connection, webhook.id, status=status, after=after, limit=limit
        )
    return ListOf(data=[delivery_body(d) for d in page.items], has_more=page.has_more)
