"""Deliveries to webhooks: claimed with a lease, tried until taken or given up, kept for a week.

A try is claimed by compare-and-swap on the count of tries, so that of several replicas one makes
it. Whoever claims and dies is followed by another try once the lease has run out: a receiver may
be told twice, under the same id, never not at all.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, delete, func, select, update

from registry import clock, tables
from registry.errors import NotFound
from registry.pages import Page, newest_first

PENDING, DELIVERED, GIVEN_UP = "pending", "delivered", "given_up"
#: Each pause between two tries is this many times the one before.
FACTOR = 5
#: With a first pause of 5 s the last try is made 27 hours after the first.
MOST_TRIES = 8
#: A pause is longer by a chance share of at most this, so that retries do not come in waves.
JITTER = 0.1
KEPT_SECONDS = 7 * 24 * 3600.0


@dataclass(frozen=True)
class Delivery:
    """A row of the deliveries table.

    Attributes:
        seq: its place among those that are there; SQLite gives the highest out again once its row
            is deleted.
        id: what the receiver is told in every try, as ``webhook-id``.
        payload: the body, in every try the same.
        next_at: when it is tried next; while it is being tried, when that counts as lost.
        answered: the last try's status; None: there was no answer, and ``error`` says why.
    """

    seq: int
    id: str
    tenant: str
    webhook_id: str
    type: str
    payload: str
    status: str
    tries: int
    next_at: float | None
    answered: int | None
    error: str | None
    created_at: float
    ended_at: float | None


@dataclass(frozen=True)
class Try:
    """The right to try a delivery once, with what that takes."""

    delivery: Delivery
    url: str
    secret: str = field(repr=False)


def due(connection: Connection, *, each: int, now: float | None = None) -> list[Delivery]:
    """What may be tried now: of each webhook the ``each`` that have waited longest."""
    table = tables.deliveries
    place = func.row_number().over(
        partition_by=table.c.webhook_id, order_by=(table.c.next_at, table.c.seq)
    )
    moment = clock.now(connection) if now is None else now
    waiting = (
        select(table.c.seq, place.label("place"))
        .where(table.c.status == PENDING, table.c.next_at <= moment)
        .subquery()
    )
    first = select(waiting.c.seq).where(waiting.c.place <= each)
    rows = connection.execute(select(table).where(table.c.seq.in_(first)).order_by(table.c.seq))
    return [_to_delivery(row) for row in rows]


def claim(
    connection: Connection, delivery: Delivery, lease: float, now: float | None = None
) -> Try | None:
    """Begin a try; None where another replica did, or the webhook was deleted."""
    table, webhooks = tables.deliveries, tables.webhooks
    moment = clock.now(connection) if now is None else now
    claimed = connection.execute(
        update(table)
        .where(
            table.c.id == delivery.id,
            table.c.status == PENDING,
            table.c.tries == delivery.tries,
            table.c.next_at == delivery.next_at,
        )
        .values(tries=delivery.tries + 1, next_at=moment + lease)
    )
    if claimed.rowcount != 1:
        return None
    row = connection.execute(select(table).where(table.c.id == delivery.id)).one()
    webhook = connection.execute(
        select(webhooks.c.url, webhooks.c.secret).where(webhooks.c.id == delivery.webhook_id)
    ).one()
    return Try(_to_delivery(row), webhook.url, webhook.secret)


def settle(
    connection: Connection,
    tried: Try,
    *,
    answered: int | None,
    error: str | None,
    first_pause: float,
    now: float | None = None,
) -> str | None:
    """Write what a try came to; the delivery's status from then on.

    A status of 200 to 299 ends it, and 410, by which a receiver says that it wants no more of it;
    otherwise it is tried again, after pauses that grow, ``MOST_TRIES`` times in all. None where the
    try came too late: its lease had run out and another one followed, or the webhook was deleted.
    """
    table = tables.deliveries
    moment = clock.now(connection) if now is None else now
    tries = tried.delivery.tries
    values: dict[str, Any] = {"answered": answered, "error": error}
    if answered is not None and 200 <= answered < 300:
        values |= {"status": DELIVERED, "ended_at": moment, "next_at": None}
    elif answered == 410 or tries >= MOST_TRIES:
        values |= {"status": GIVEN_UP, "ended_at": moment, "next_at": None}
    else:
        pause = first_pause * FACTOR ** (tries - 1) * (1 + JITTER * random.random())
        values |= {"status": PENDING, "next_at": moment + pause}
    written = connection.execute(
        update(table)
        .where(
            table.c.id == tried.delivery.id,
            table.c.status == PENDING,
            table.c.tries == tries,
        )
        .values(**values)
    )
    status: str = values["status"]
    return status if written.rowcount == 1 else None


def list_deliveries(
    connection: Connection,
    webhook_id: str,
    *,
    status: str | None = None,
    after: str | None = None,
    limit: int = 20,
) -> Page[Delivery]:
    """Newest first. Raises NotFound: the webhook has no delivery ``after``."""
    table = tables.deliveries
    query = select(table).where(table.c.webhook_id == webhook_id)
    before: int | None = None
    if after is not None:
        last = connection.execute(query.where(table.c.id == after)).one_or_none()
        if last is None:
            raise NotFound(f"after: delivery {after!r} does not exist", param="after")
        before = last.seq
    if status is not None:
        query = query.where(table.c.status == status)
    return newest_first(connection, query, table.c.seq, _to_delivery, before=before, limit=limit)


def forget(connection: Connection, before: float) -> int:
    """Delete what ended before a moment; how many these were."""
    table = tables.deliveries
    return connection.execute(delete(table).where(table.c.ended_at < before)).rowcount


def _to_delivery(row: Row[Any]) -> Delivery:
    return Delivery(**row._mapping)
