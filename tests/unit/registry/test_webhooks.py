"""Events are announced in the transaction of their change, and delivered at least once."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from registry import attempts, deliveries, jobs, webhooks
from registry.database import Database
from registry.deliveries import MOST_TRIES, Delivery, Try
from registry.endpoints import create_endpoint, delete_endpoint
from registry.errors import Conflict, JobFailed, NotFound
from registry.moves import Target
from registry.results import Result
from registry.webhooks import Webhook
from tests.unit.registry.conftest import TENANT, add_version

URL = "https://receiver.example/hook"


def hook(database: Database, *events: str, tenant: str = TENANT) -> Webhook:
    with database.write() as connection:
        return webhooks.create_webhook(connection, tenant, URL, events, actor="ada")


def told(database: Database, webhook: Webhook) -> list[dict[str, Any]]:
    """The payloads for a webhook, oldest first."""
    with database.read() as connection:
        listed = deliveries.list_deliveries(connection, webhook.id, limit=100).items
    return [json.loads(delivery.payload) for delivery in reversed(listed)]


def only(database: Database, webhook: Webhook) -> Delivery:
    with database.read() as connection:
        (delivery,) = deliveries.list_deliveries(connection, webhook.id).items
    return delivery


def announce(database: Database, times: int = 1) -> None:
    with database.write() as connection:
        for number in range(times):
            webhooks.announce(connection, TENANT, "endpoint.moved", {"number": number})


def claimed(database: Database, now: float, lease: float = 30.0) -> list[Try]:
    with database.write() as connection:
        found = [
            deliveries.claim(connection, delivery, lease, now)
            for delivery in deliveries.due(connection, each=4, now=now)
        ]
    return [tried for tried in found if tried is not None]


def settle(database: Database, tried: Try, now: float, **outcome: Any) -> str | None:
    with database.write() as connection:
        outcome = {"answered": None, "error": None, **outcome}
        return deliveries.settle(connection, tried, first_pause=5.0, now=now, **outcome)


def queued(database: Database) -> jobs.Job:
    with database.write() as connection:
        return jobs.submit_job(connection, TENANT, "edit", base="atlas", request={}, actor="bob")


def test_every_end_of_a_job_is_told_to_those_who_asked(database: Database) -> None:
    every = hook(database, "job.ended")
    failed = hook(database, "job.failed", "endpoint.moved")
    hook(database, "job.ended", tenant="other")
    for end in ("succeed", "fail", "cancel"):
        job = queued(database)
        with database.write() as connection:
            if end == "cancel":
                jobs.cancel_job(connection, TENANT, job.id, actor="ada")
                continue
            claim = attempts.claim(connection, job.id, 1, "worker", 60.0)
            assert claim is not None
            if end == "succeed":
                attempts.finish(connection, claim, Result())
            else:
                attempts.fail(connection, claim, JobFailed("broken"))
    found = told(database, every)
    assert [event["type"] for event in found] == ["job.succeeded", "job.failed", "job.cancelled"]
    assert [event["data"]["status"] for event in found] == ["succeeded", "failed", "cancelled"]
    assert found[1]["data"]["error"]["message"] == "broken"
    assert found[0]["timestamp"].endswith("Z")
    assert [event["type"] for event in told(database, failed)] == ["job.failed"]


def test_moves_are_told_with_what_they_changed(database: Database) -> None:
    webhook = hook(database, "endpoint.moved")
    version = add_version(database, "a" * 64)
    with database.write() as connection:
        create_endpoint(connection, TENANT, "line", (Target(version.id),), actor="bob")
        delete_endpoint(connection, TENANT, "line", generation=1, actor="ada")
    created, deleted = (event["data"] for event in told(database, webhook))
    assert created["after"] == [{"version": version.id, "weight": 1.0}]
    assert (created["kind"], created["generation"], created["actor"]) == ("create", 1, "bob")
    assert (deleted["kind"], deleted["after"], deleted["actor"]) == ("delete", None, "ada")


def test_a_change_that_is_taken_back_is_not_told(database: Database) -> None:
    webhook = hook(database, "job.ended")
    job = queued(database)

    def cancelled_and_taken_back() -> None:
        with database.write() as connection:
            jobs.cancel_job(connection, TENANT, job.id, actor="ada")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        cancelled_and_taken_back()
    assert told(database, webhook) == []


def test_each_try_is_claimed_once(database: Database) -> None:
    hook(database, "endpoint.moved")
    announce(database, times=4)
    with database.read() as connection:
        waiting = deliveries.due(connection, each=4)

    def claim_all(_: int) -> list[str]:
        found = []
        for delivery in waiting:
            with database.write() as connection:
                if deliveries.claim(connection, delivery, 30.0):
                    found.append(delivery.id)
        return found

    with ThreadPoolExecutor(4) as pool:
        found = [name for names in pool.map(claim_all, range(4)) for name in names]
    assert sorted(found) == sorted(delivery.id for delivery in waiting)


def test_a_sender_that_dies_is_followed_by_another_with_the_same_id(database: Database) -> None:
    webhook = hook(database, "endpoint.moved")
    announce(database)
    now = only(database, webhook).created_at
    (dead,) = claimed(database, now, lease=30.0)
    assert claimed(database, now + 29) == []
    (second,) = claimed(database, now + 31)
    assert (second.delivery.id, second.delivery.payload) == (
        dead.delivery.id,
        dead.delivery.payload,
    )
    assert settle(database, dead, now + 32, answered=200) is None
    assert only(database, webhook).status == "pending"
    assert settle(database, second, now + 33, answered=204) == "delivered"
    ended = only(database, webhook)
    assert (ended.status, ended.tries, ended.answered) == ("delivered", 2, 204)


def test_pauses_grow_until_it_is_given_up_after_a_day(database: Database) -> None:
    webhook = hook(database, "endpoint.moved")
    announce(database)
    begun = now = only(database, webhook).created_at
    pauses = []
    for number in range(1, MOST_TRIES + 1):
        (tried,) = claimed(database, now)
        status = settle(database, tried, now, answered=500 if number % 2 else None, error="x")
        assert status == ("pending" if number < MOST_TRIES else "given_up")
        following = only(database, webhook).next_at
        if following is not None:
            assert claimed(database, following - 0.001) == []
            pauses.append(following - now)
            now = following
    assert all(4.5 < later / earlier < 5.6 for earlier, later in pairwise(pauses))
    assert 24 < (now - begun) / 3600 < 32
    assert claimed(database, now + 1e9) == []


def test_a_receiver_that_is_gone_is_not_asked_again(database: Database) -> None:
    webhook = hook(database, "endpoint.moved")
    announce(database)
    (tried,) = claimed(database, only(database, webhook).created_at)
    assert settle(database, tried, 0.0, answered=410) == "given_up"


def test_one_webhooks_backlog_is_not_before_anothers_events(database: Database) -> None:
    first, second = hook(database, "endpoint.moved"), hook(database, "job.ended")
    announce(database, times=50)
    with database.write() as connection:
        webhooks.announce(connection, TENANT, "job.failed", {})
        found = deliveries.due(connection, each=4)
    assert [d.webhook_id for d in found].count(first.id) == 4
    assert [d.webhook_id for d in found].count(second.id) == 1


def test_a_deleted_webhook_is_told_nothing_more(database: Database) -> None:
    webhook = hook(database, "endpoint.moved")
    announce(database)
    with database.read() as connection:
        (waiting,) = deliveries.due(connection, each=4)
    with database.write() as connection:
        webhooks.delete_webhook(connection, TENANT, webhook.id, actor="ada")
        assert deliveries.claim(connection, waiting, 30.0) is None
        with pytest.raises(NotFound):
            webhooks.get_webhook(connection, TENANT, webhook.id)
    announce(database)
    with database.read() as connection:
        assert deliveries.due(connection, each=4) == []


def test_an_answer_for_a_deleted_webhook_settles_no_other_delivery(database: Database) -> None:
    """SQLite gives the place of the last row that was deleted to the next one."""
    webhook = hook(database, "endpoint.moved")
    announce(database)
    waiting = only(database, webhook)
    (late,) = claimed(database, waiting.created_at)
    with database.write() as connection:
        webhooks.delete_webhook(connection, TENANT, webhook.id, actor="ada")
    other = hook(database, "endpoint.moved", tenant="other")
    with database.write() as connection:
        webhooks.announce(connection, "other", "endpoint.moved", {})
    following = only(database, other)
    with database.write() as connection:
        assert deliveries.claim(connection, replace(waiting, next_at=following.next_at), 30) is None
    (tried,) = claimed(database, following.created_at)
    assert settle(database, late, following.created_at, answered=200) is None
    assert only(database, other).status == "pending"
    assert settle(database, tried, following.created_at, answered=204) == "delivered"


def test_a_tenant_has_so_many_webhooks_and_sees_no_other_tenants(database: Database) -> None:
    other = hook(database, "job.ended", tenant="other")
    for _ in range(webhooks.MOST):
        hook(database, "job.ended")
    with pytest.raises(Conflict, match="at most 20"):
        hook(database, "job.ended")
    with database.read() as connection:
        page = webhooks.list_webhooks(connection, TENANT, limit=100)
        assert len(page.items) == webhooks.MOST
        with pytest.raises(NotFound):
            webhooks.get_webhook(connection, TENANT, other.id)
    assert other.secret.startswith("whsec_")
    assert other.secret not in repr(other)


def test_what_ended_is_forgotten_after_a_while(database: Database) -> None:
    webhook = hook(database, "endpoint.moved")
    announce(database, times=2)
    with database.read() as connection:
        now = deliveries.list_deliveries(connection, webhook.id).items[0].created_at
    tried, _ = claimed(database, now)
    settle(database, tried, now, answered=200)
    with database.write() as connection:
        assert deliveries.forget(connection, now) == 0
        assert deliveries.forget(connection, now + 1) == 1
    assert len(told(database, webhook)) == 1
