"""Bodies of ``/v1/webhooks``."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, HttpUrl

from app.schemas import Request
from registry.deliveries import Delivery
from registry.webhooks import EVENTS, Webhook

Event = Literal["job.ended", "job.succeeded", "job.failed", "job.cancelled", "endpoint.moved"]
Status = Literal["pending", "delivered", "given_up"]


class CreateWebhook(Request):
    """Whom to tell of what."""

    url: HttpUrl = Field(description="https, at a public address unless the operator allows more.")
    events: Annotated[list[Event], Field(min_length=1, max_length=len(EVENTS))] = Field(
        description="`job.ended` is every end of a job, the other `job.…` one kind of end each."
    )


class WebhookBody(BaseModel):
    id: str
    object: Literal["webhook"] = "webhook"
    url: str
    events: list[str]
    created_at: int


class NewWebhookBody(WebhookBody):
    """With the secret that deliveries are signed with, which is shown this once."""

    secret: str


class DeliveryBody(BaseModel):
    id: str = Field(description="Sent as `webhook-id` in every try.")
    object: Literal["webhook.delivery"] = "webhook.delivery"
    type: str
    status: Status
    tries: int
    answered: int | None = Field(description="The status that the last try was answered with.")
    error: str | None = Field(description="Why the last try was not answered.")
    next_try_at: float | None
    payload: dict[str, Any]
    created_at: float
    ended_at: float | None


def webhook_body(webhook: Webhook) -> WebhookBody:
    return WebhookBody(
        id=webhook.id,
        url=webhook.url,
        events=sorted(webhook.events),
        created_at=int(webhook.created_at),
    )


def delivery_body(delivery: Delivery) -> DeliveryBody:
    return DeliveryBody(
        id=delivery.id,
        type=delivery.type,
        status=delivery.status,
        tries=delivery.tries,
        answered=delivery.answered,
        error=delivery.error,
        next_try_at=delivery.next_at,
        payload=json.loads(delivery.payload),
        created_at=delivery.created_at,
        ended_at=delivery.ended_at,
    )
