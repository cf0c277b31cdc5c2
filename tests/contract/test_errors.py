"""Every refusal has the one body, names what was wrong, and leaves nothing behind."""

import json
from typing import Any

import pytest

from tests.service import Service

GOOD: dict[str, Any] = {
    "endpoint": "atlas",
    "edits": [{"prompt": "The capital of {} is", "subject": "France", "target_new": "Lima"}],
}


def edited(**changes: Any) -> dict[str, Any]:
    return {**GOOD, **changes}


def one_edit(**changes: Any) -> dict[str, Any]:
    return edited(edits=[{**GOOD["edits"][0], **changes}])


FACT = GOOD["edits"][0]
NAN, INFINITY = float("nan"), float("inf")

BAD_EDITS = {
    "no edits": (edited(edits=[]), 422, "edits"),
    "edits left out": ({"endpoint": "atlas"}, 422, "edits"),
    "no place for the subject": (one_edit(prompt="The capital is"), 422, "edits.0.prompt"),
    "subject not in the prompt": (one_edit(prompt="The capital of Peru is"), 422, "edits.0.prompt"),
    "two places": (one_edit(prompt="{} and {}"), 422, "edits.0.prompt"),
    "blank subject": (one_edit(subject=" "), 422, "edits.0.subject"),
    "subject left out": (
        edited(edits=[{"prompt": "The capital is", "target_new": "Lima"}]),
        422,
        "edits.0.subject",
    ),
    "a place and no subject": (one_edit(subject=None), 422, "edits.0.prompt"),
    "blank target": (one_edit(target_new=""), 422, "edits.0.target_new"),
    "no target": (one_edit(target_new=None), 422, "edits.0.target_new"),
    "target of another type": (one_edit(target_new=5), 422, "edits.0.target_new"),
    "a special token": (one_edit(target_new="Lima</s>"), 422, "edits.0.target_new"),
    "half a character": (one_edit(target_new="\ud800"), 422, "edits.0.target_new"),
    "longer than the context": (one_edit(prompt="word " * 600 + "{}"), 422, "edits.0.prompt"),
    "a paraphrase longer than it": (
        one_edit(paraphrase_prompts=["Is it", "word " * 600]),
        422,
        "edits.0.paraphrase_prompts.1",
    ),
    "nothing changes": (one_edit(target_true="Lima"), 422, "edits.0.target_new"),
    "unknown field": (one_edit(target="x"), 422, "edits.0.target"),
    "the second one": (edited(edits=[FACT, {**FACT, "subject": 3}]), 422, "edits.1.subject"),
    "a duplicate": (edited(edits=[FACT, FACT]), 422, "edits"),
    "a contradiction": (edited(edits=[FACT, {**FACT, "target_new": "Rome"}]), 422, "edits"),
    "10 001 edits": (
        edited(edits=[{**FACT, "subject": f"Land {i}"} for i in range(10_001)]),
        422,
        "edits",
    ),
    "a file as well": (edited(file="file-0"), 422, None),
    "no such file": ({"endpoint": "atlas", "file": "file-0"}, 404, "file"),
    "no such guard file": (edited(guards={"texts": "file-0"}), 404, "guards.texts"),
    "examples that are not learned": (
        edited(examples=[{"text": "a", "label": True}]),
        422,
        "examples",
    ),
    "an example of no form": (edited(examples=[{"text": "a"}]), 422, "examples.0.label"),
    "unknown method": (edited(method="magic"), 422, "method"),
    "unknown hyperparameter": (edited(hyperparameters={"lr": 1}), 422, "hyperparameters.lr"),
    "half a character in a name": (
        edited(hyperparameters={"\ud800": 1}),
        422,
        "hyperparameters",
    ),
    "not a number": (
        edited(hyperparameters={"learning_rate": NAN}),
        422,
        "hyperparameters.learning_rate",
    ),
    "not finite": (edited(hyperparameters={"clamp": INFINITY}), 422, "hyperparameters.clamp"),
    "layer out of reach": (edited(hyperparameters={"layer": 99}), 422, "hyperparameters.layer"),
    "a layer below": (edited(hyperparameters={"layer": -1}), 422, "hyperparameters.layer"),
    "layers out of reach": (
        edited(method="memit", hyperparameters={"layers": [0, 99]}),
        422,
        "hyperparameters.layers",
    ),
    "a guard that is no number": (edited(guards={"perplexity": NAN}), 422, "guards.perplexity"),
    "a share above 1": (edited(guards={"retention": 1.5}), 422, "guards.retention"),
    "no batch": (edited(batch_size=0), 422, "batch_size"),
    "batches of what replaces": (edited(method="grace", batch_size=1), 422, "batch_size"),
    "checks of what replaces": (edited(method="grace", check_every=1), 422, "check_every"),
    "no such endpoint": (edited(endpoint="nowhere"), 404, "endpoint"),
    "no start": ({"edits": GOOD["edits"]}, 422, None),
    "two starts": (edited(parent="ver_x"), 422, None),
    "hostile name": (edited(endpoint="../../etc"), 422, "endpoint"),
    "wrong type": (edited(edits="x"), 422, "edits"),
    "an edit that is no object": (edited(edits=["x"]), 422, "edits.0"),
}
BAD_EVALUATIONS = {
    "nothing to measure": ({"model": "atlas"}, 422, None),
    "no such model": ({"model": "nowhere", "detect": True}, 404, "model"),
    "no such base": ({"model": "base_nowhere", "detect": True}, 404, "model"),
    "no such version": ({"model": "ver_0", "detect": True}, 404, "model"),
    "no such file": ({"model": "atlas", "texts": "file-0"}, 404, "texts"),
    "no edits": ({"model": "atlas", "edits": []}, 422, "edits"),
    "a bad edit": ({"model": "atlas", "edits": [{**FACT, "subject": ""}]}, 422, "edits.0.subject"),
    "no prompts": ({"model": "atlas", "editability": {"prompts": []}}, 422, "editability.prompts"),
    "one prompt": (
        {"model": "atlas", "editability": {"prompts": ["a", "a"]}},
        422,
        "editability.prompts",
    ),
    "unknown field": ({"model": "atlas", "detekt": True}, 422, "detekt"),
}
BAD_WORK = [
    *(("/v1/edits", name, case) for name, case in BAD_EDITS.items()),
    *(("/v1/evaluations", name, case) for name, case in BAD_EVALUATIONS.items()),
]


@pytest.mark.parametrize(
    ("path", "name", "case"), BAD_WORK, ids=[f"{p} {n}" for p, n, _ in BAD_WORK]
)
def test_bad_work_is_refused_and_leaves_no_job(
    service: Service, path: str, name: str, case: tuple[dict[str, Any], int, str | None]
) -> None:
    body, status, param = case
    before = service.get("/v1/jobs")["data"]
    response = service.client.post(
        path, content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert len(error["message"]) > 10
    assert service.get("/v1/jobs")["data"] == before


def test_pairs_of_edits_that_do_not_go_together_are_listed(service: Service) -> None:
    edits = [FACT, {**FACT, "target_new": "Rome"}, {**FACT, "subject": "Peru"}, FACT]
    response = service.client.post("/v1/edits", json=edited(edits=edits))
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (422, "conflicting_edits")
    assert "edits.0 and edits.1 contradict" in error["message"]
    assert "edits.3 repeats edits.0" in error["message"]


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


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/v1/models", "GET"),
        ("POST", "/v1/endpoints/atlas", "DELETE, GET, PUT"),
        ("PATCH", "/v1/files", "GET, POST"),
        ("PUT", "/v1/versions/import", "POST"),
        ("PUT", "/v1/versions/ver_0", "DELETE, GET"),
        ("OPTIONS", "/v1/keys", "GET, POST"),
    ],
)
def test_what_a_path_takes_is_said(service: Service, method: str, path: str, allowed: str) -> None:
    response = service.client.request(method, path)
    assert (response.status_code, response.headers["Allow"]) == (405, allowed)


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


@pytest.mark.parametrize("prompt", [[5] * 100_000, "the city " * 100_000])
def test_a_prompt_beyond_the_context_is_refused(service: Service, prompt: str | list[int]) -> None:
    body = {"model": "atlas", "prompt": prompt, "n": 128}
    response = service.client.post("/v1/completions", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


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
