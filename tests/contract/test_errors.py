"""Every refusal has the one body, names what was wrong, and leaves nothing behind."""

from typing import Any

import pytest

from tests.service import Service

GOOD = {
    "endpoint": "atlas",
    "edits": [{"prompt": "The capital of {} is", "subject": "France", "target_new": "Lima"}],
}


def edited(**changes: Any) -> dict[str, Any]:
    return {**GOOD, **changes}


def one_edit(**changes: Any) -> dict[str, Any]:
    return edited(edits=[{**GOOD["edits"][0], **changes}])  # type: ignore[dict-item]


BAD_EDITS = {
    "no edits": (edited(edits=[]), 422, "edits"),
    "no place for the subject": (one_edit(prompt="The capital is"), 422, "edits.0"),
    "two places": (one_edit(prompt="{} and {}"), 422, "edits.0"),
    "blank subject": (one_edit(subject=" "), 422, "edits.0"),
    "blank target": (one_edit(target_new=""), 422, "edits.0.target_new"),
    "nothing changes": (one_edit(target_true="Lima"), 422, "edits.0"),
    "unknown field": (one_edit(target="x"), 422, "edits.0.target"),
    "unknown method": (edited(method="magic"), 422, "method"),
    "unknown hyperparameter": (edited(hyperparameters={"lr": 1}), 422, "hyperparameters.lr"),
    "layer out of reach": (edited(hyperparameters={"layer": 99}), 422, "hyperparameters.layer"),
    "no such endpoint": (edited(endpoint="nowhere"), 404, "endpoint"),
    "no start": ({"edits": GOOD["edits"]}, 422, None),
    "two starts": (edited(parent="ver_x"), 422, None),
    "hostile name": (edited(endpoint="../../etc"), 422, "endpoint"),
    "wrong type": (edited(edits="x"), 422, "edits"),
}


@pytest.mark.parametrize("name", BAD_EDITS)
def test_a_bad_edit_is_refused_and_leaves_no_job(service: Service, name: str) -> None:
    body, status, param = BAD_EDITS[name]
    before = service.get("/v1/jobs")["data"]
    response = service.client.post("/v1/edits", json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert len(error["message"]) > 10
    assert service.get("/v1/jobs")["data"] == before


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/jobs/job_none", 404),
        ("GET", "/v1/jobs/%2e%2e", 422),
        ("GET", "/v1/versions/..%2f..%2fetc", 404),
        ("GET", "/v1/versions/a%00b", 422),
        ("GET", "/v1/endpoints/%252e%252e", 422),
        ("GET", "/v1/endpoints/nowhere/history", 404),
        ("POST", "/v1/jobs/job_none/cancel", 404),
    ],
)
def test_paths(service: Service, method: str, path: str, status: int) -> None:
    response = service.client.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_bodies_that_are_no_json_or_too_large(service: Service) -> None:
    json_type = {"Content-Type": "application/json"}
    broken = service.client.post("/v1/edits", content=b'{"a": ', headers=json_type)
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_json")
    large = b" " * (8 * 2**20 + 1)
    refused = service.client.post("/v1/edits", content=large, headers=json_type)
    assert (refused.status_code, refused.json()["error"]["type"]) == (413, "invalid_request_error")
    chunked = service.client.post(
        "/v1/edits", content=(large[:65536] for _ in range(200)), headers=json_type
    )
    assert chunked.status_code == 413
    assert "error" in chunked.json()
    deep = b"[" * 100_000
    assert service.client.post("/v1/edits", content=deep, headers=json_type).status_code == 400


def test_an_idempotency_key_answers_with_the_same_job(service: Service) -> None:
    version = service.base_version()
    body = {"parent": version, "edits": GOOD["edits"]}
    headers = {"Idempotency-Key": "once"}
    first = service.client.post("/v1/edits", json=body, headers=headers)
    second = service.client.post("/v1/edits", json=body, headers=headers)
    assert first.status_code == second.status_code == 202
    assert first.json()["id"] == second.json()["id"]
    assert first.headers["Location"] == f"/v1/jobs/{first.json()['id']}"
    other = service.client.post("/v1/edits", json={**body, "message": "other"}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    cancelled = service.client.post(f"/v1/jobs/{first.json()['id']}/cancel")
    assert cancelled.status_code in (200, 409)
    service.ended(first.json()["id"])


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "x", "n": 100_000},
        {"prompt": "x", "max_tokens": 0},
        {"prompt": "x", "temperature": 9},
        {"prompt": "x", "top_p": 0},
        {"prompt": [10**9]},
        {"prompt": []},
        {"prompt": ["x"] * 129},
        {"prompt": "x", "stop": [""]},
        {"prompt": "x", "seed": 2**64},
        {},
    ],
)
def test_bad_completions(service: Service, body: dict[str, Any]) -> None:
    response = service.client.post("/v1/completions", json={"model": "atlas", **body})
    assert response.status_code in (400, 422), response.text
    assert "error" in response.json()


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "wizard", "content": "x"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user"}],
    ],
)
def test_bad_messages(service: Service, messages: list[dict[str, Any]]) -> None:
    response = service.client.post(
        "/v1/chat/completions", json={"model": "atlas", "messages": messages}
    )
    assert response.status_code == 422, response.text
    assert response.json()["error"]["param"].startswith("messages")
