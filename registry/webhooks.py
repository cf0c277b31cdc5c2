"""Webhooks: URLs that are told of job ends and endpoint moves.

What happens is announced in the transaction that makes it happen: a row for each webhook that asked
for it, to be delivered from there (``registry.deliveries``). Secrets are kept as they are, since
they sign.
"""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select

from registry import audit, clock, tables
from registry.errors import Conflict, NotFound
from registry.pages import Page, newest_first

JOB_EVENTS = frozenset({"job.succeeded", "job.failed", "job.cancelled"})
#: What a webhook may ask for instead of each of these.
JOB_ENDED = "job.ended"
MOVED = "endpoint.moved"
EVENTS = JOB_EVENTS | {JOB_ENDED, MOVED}
#: Most webhooks of a tenant.
MOST = 20
SECRET_PREFIX = "whsec_"
SECRET_BYTES = 32


@dataclass(frozen=True)
class Webhook:
    """A row of the webhooks table; its secret is nowhere shown."""

    seq: int
    id: str
    tenant: str
    url: str
    events: frozenset[str]
    secret: str = field(repr=False)
    created_at: float


def create_webhook(
    connection: Connection, tenant: str, url: str, events: Iterable[str], *, actor: str
) -> Webhook:
    """Tell a URL of these events from now on.

    Raises:
        Conflict: the tenant has as many as it may have.
    """
    table = tables.webhooks
    count = select(func.count()).where(table.c.tenant == tenant)
    if connection.execute(count).scalar_one() >= MOST:
        raise Conflict(
            f"a tenant has at most {MOST} webhooks; delete one that is no longer needed",
            code="too_many_webhooks",
        )
    webhook_id = "wh_" + secrets.token_hex(12)
    secret = SECRET_PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()
    connection.execute(
        insert(table).values(
            id=webhook_id,
            tenant=tenant,
            url=url,
            events=sorted(events),
            secret=secret,
            created_at=time.time(),
        )
    )
    webhook = get_webhook(connection, tenant, webhook_id)
    _audit(connection, webhook, "create", actor)
    return webhook


def get_webhook(connection: Connection, tenant: str, webhook_id: str) -> Webhook:
    """Raises NotFound."""
    table = tables.webhooks
    row = connection.execute(
        select(table).where(table.c.tenant == tenant, table.c.id == webhook_id)
    ).one_or_none()
    if row is None:
        raise NotFound(
            f"webhook {webhook_id!r} does not exist; GET /v1/webhooks lists those that do",
            code="webhook_not_found",
        )
    return _to_webhook(row)


def list_webhooks(
    connection: Connection, tenant: str, *, after: str | None = None, limit: int = 20
) -> Page[Webhook]:
    """Newest first."""
    table = tables.webhooks
    query = select(table).where(table.c.tenant == tenant)
    before = None if after is None else get_webhook(connection, tenant, after).seq
    return newest_first(connection, query, table.c.seq, _to_webhook, before=before, limit=limit)


def delete_webhook(connection: Connection, tenant: str, webhook_id: str, *, actor: str) -> None:
    """Tell it nothing more, what waits for it included. Raises NotFound."""
    webhook = get_webhook(connection, tenant, webhook_id)
    waiting, table = tables.deliveries, tables.webhooks
    connection.execute(delete(waiting).where(waiting.c.webhook_id == webhook_id))
    connection.execute(delete(table).where(table.c.id == webhook_id))
    _audit(connection, webhook, "delete", actor)


def announce(connection: Connection, tenant: str, event: str, data: Mapping[str, Any]) -> None:
    """Have the tenant's webhooks that asked for an event told of it once this is committed."""
    table = tables.webhooks
    asked = {event, JOB_ENDED} if event in JOB_EVENTS else {event}
    rows = connection.execute(select(table.c.id, table.c.events).where(table.c.tenant == tenant))
    chosen = [row.id for row in rows if asked & set(row.events)]
    if not chosen:
        return
    now = clock.now(connection)
    told = {
        "type": event,
        "timestamp": datetime.fromtimestamp(now, UTC).isoformat().replace("+00:00", "Z"),
        "data": data,
    }
    payload = json.dumps(told, ensure_ascii=False, separators=(",", ":"))
    connection.execute(
        insert(tables.deliveries),
        [
            {
                "id": "msg_" + secrets.token_hex(12),
                "tenant": tenant,
                "webhook_id": webhook_id,
                "type": event,
                "payload": payload,
                "status": "pending",
                "tries": 0,
                "next_at": now,
                "created_at": now,
            }
            for webhook_id in chosen
        ],
    )


def _audit(connection: Connection, webhook: Webhook, done: str, actor: str) -> None:
    told = {"url": webhook.url, "events": sorted(webhook.events)}
    before, after = (None, told) if done == "create" else (told, None)
    audit.record(
        connection,
        webhook.tenant,
        actor=actor,
        action=f"webhook.{done}",
        object=webhook.id,
        before=before,
        after=after,
    )


def _to_webhook(row: Row[Any]) -> Webhook:
    return Webhook(
        seq=row.seq,
        id=row.id,
        tenant=row.tenant,
        url=row.url,
        events=frozenset(row.events),
        secret=row.secret,
        created_at=row.created_at,
    )
