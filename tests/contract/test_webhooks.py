"""``/v1/webhooks`` on a running service that may deliver to this machine."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.receiver import Receiver, receiving
from tests.service import LENIENT, Service, capital_edit, wait_for


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def create(service: Service, **body: Any) -> dict[str, Any]:
    answer = service.client.post("/v1/webhooks", json=body)
    assert answer.status_code == 201, answer.text
    webhook: dict[str, Any] = answer.json()
    return webhook


def test_a_job_and_the_moves_around_it_are_told(service: Service, receiver: Receiver) -> None:
    webhook = create(service, url=f"{receiver.url}/ok", events=["job.ended", "endpoint.moved"])
    service.endpoint("hooked", service.base_version())
    job = service.post_edit(
        endpoint="hooked",
        edits=[capital_edit("France", "Oslo")],
        hyperparameters={"steps": 1},
        guards=LENIENT,
    )
    ended = service.ended(job["id"])
    assert ended["activated"], ended

    def told() -> dict[str, dict[str, Any]]:
        bodies = [json.loads(received.body) for received in receiver.requests]
        mine = [b for b in bodies if job["id"] == b["data"].get("id") or b["data"].get("name")]
        return {f"{b['type']} {b['data'].get('kind')}": b["data"] for b in mine}

    expected = {"endpoint.moved create", "endpoint.moved activate", "job.succeeded edit"}
    wait_for(lambda: expected <= told().keys(), 30, lambda: service.log()[-3000:])
    assert told()["job.succeeded edit"]["version"] == ended["version"]
    assert told()["endpoint.moved activate"]["after"] == [
        {"version": ended["version"], "weight": 1.0}
    ]
    client = openai.OpenAI(api_key="none", webhook_secret=webhook["secret"])
    for received in receiver.requests:
        client.webhooks.verify_signature(received.body, received.headers)
    client.close()
    path = f"/v1/webhooks/{webhook['id']}"
    wait_for(lambda: service.get(f"{path}/deliveries?status=pending")["data"] == [], 30)
    listed = service.get(f"{path}/deliveries?limit=2")
    assert listed["has_more"]
    assert {delivery["status"] for delivery in listed["data"]} == {"delivered"}
    older = service.get(f"{path}/deliveries?after={listed['data'][-1]['id']}")
    assert {d["id"] for d in older["data"]}.isdisjoint(d["id"] for d in listed["data"])
    lost = service.client.get(f"{path}/deliveries?after=msg_unknown")
    assert (lost.status_code, lost.json()["error"]["param"]) == (404, "after")
    assert service.client.delete(path).status_code == 204
    assert service.client.get(path).status_code == 404
    assert service.client.get(f"{path}/deliveries").status_code == 404
    actions = [e["action"] for e in service.get(f"/v1/audit?target={webhook['id']}")["data"]]
    assert actions == ["webhook.delete", "webhook.create"]


def test_the_secret_is_shown_once(service: Service, receiver: Receiver) -> None:
    webhook = create(service, url=f"{receiver.url}/ok", events=["job.failed"])
    secret = webhook.pop("secret")
    assert secret.startswith("whsec_")
    assert service.get(f"/v1/webhooks/{webhook['id']}") == webhook
    assert webhook in service.get("/v1/webhooks")["data"]
    everything = [service.client.get(path).text for path in ("/v1/webhooks", "/v1/audit?limit=100")]
    assert secret not in "".join(everything)
    assert secret not in service.log()
    assert service.client.delete(f"/v1/webhooks/{webhook['id']}").status_code == 204


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"url": "https://10.0.0.1/", "events": ["job.ended"]}, 422, "url"),
        ({"url": "ftp://receiver.example/", "events": ["job.ended"]}, 422, "url"),
        ({"url": "https://receiver.example/", "events": []}, 422, "events"),
        ({"url": "https://receiver.example/", "events": ["job.begun"]}, 422, "events.0"),
        ({"url": "https://" + "a" * 3000, "events": ["job.ended"]}, 422, "url"),
    ],
)
def test_what_cannot_be_told_is_refused(
    service: Service, body: dict[str, Any], status: int, param: str
) -> None:
    answer = service.client.post("/v1/webhooks", json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param
