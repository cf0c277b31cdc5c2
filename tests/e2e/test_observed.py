"""Logs, traces and full queues, on one service that logs all it can as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.collector import Collector, Span
from tests.service import LENIENT, SLOW, Service, capital_edit, wait_for

MARK = "Xylo7secret"
TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Service]:
    service = Service(
        tmp_path_factory.mktemp("observed"),
        ERRATA_LOG_FORMAT="json",
        ERRATA_LOG_LEVEL="DEBUG",
        ERRATA_REQUIRE_KEYS="true",
        ERRATA_MAX_TENANT_JOBS="2",
        ERRATA_COVARIANCE_TOKENS="3000",
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
        OTEL_BSP_SCHEDULE_DELAY="200",
    )
    key = service.new_key("ada", "--scope", "infer,edit,admin")
    service.client.headers["Authorization"] = f"Bearer {key}"
    with service:
        yield service


def lines(service: Service) -> list[dict[str, Any]]:
    return [json.loads(line) for line in service.log().splitlines()]


def edit(**more: Any) -> dict[str, Any]:
    body = {
        "endpoint": "atlas",
        "edits": [capital_edit("Fiji", "Lima")],
        "hyperparameters": {"steps": 5},
        "guards": LENIENT,
    }
    return {**body, **more}


def test_one_trace_goes_from_a_request_to_its_jobs_end(
    observed: Service, collector: Collector
) -> None:
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "x-request-id": "ticket-17"}
    posted = observed.client.post("/v1/edits", json=edit(), headers=headers)
    assert posted.status_code == 202, posted.text
    assert posted.headers["x-request-id"] == "ticket-17"
    job = observed.ended(posted.json()["id"])
    assert job["status"] == "succeeded", job

    def work() -> list[Span]:
        return [s for s in collector.of(TRACE) if s.attributes.get("errata.job") == job["id"]]

    def inner() -> list[str]:
        return sorted(s.name for s in collector.of(TRACE) if s.parent in [w.id for w in work()])

    wanted = ["artifact", "claim", "commit", "guards", "method", "metrics", "metrics", "metrics"]
    wait_for(lambda: inner() == wanted, 30, lambda: str(collector.of(TRACE)))
    [attempt] = work()
    [request] = [span for span in collector.of(TRACE) if span.name == "POST /v1/edits"]
    assert (request.parent, request.part) == (SPAN, "api")
    assert (attempt.name, attempt.parent, attempt.part) == ("job edit", request.id, "work-horse")

    told = [line for line in lines(observed) if line.get("job_id") == job["id"]]
    within = [line for line in told if line.get("attempt") == 1 and "trace_id" in line]
    assert within
    assert {(line["trace_id"], line["request_id"]) for line in within} == {(TRACE, "ticket-17")}


def test_where_a_completions_seconds_went(observed: Service, collector: Collector) -> None:
    trace = TRACE[::-1]
    headers = {"traceparent": f"00-{trace}-{SPAN}-01"}
    body = {"model": "atlas", "prompt": "The capital of Fiji is", "max_tokens": 8, "stream": True}
    assert observed.client.post("/v1/completions", json=body, headers=headers).status_code == 200
    parts = {"queue", "prefill", "decode"}

    def there() -> bool:
        return {span.name for span in collector.of(trace)} >= {"generate", *parts}

    wait_for(there, 30, lambda: str(collector.of(trace)))
    by_name = {span.name: span for span in collector.of(trace)}
    assert {by_name[part].parent for part in parts} == {by_name["generate"].id}
    assert by_name["generate"].parent == by_name["POST /v1/completions"].id


def test_a_full_queue_answers_429(observed: Service) -> None:
    slow = edit(edits=[capital_edit("Peru", "Oslo")], hyperparameters=SLOW)
    first = observed.client.post("/v1/edits", json=slow, headers={"Idempotency-Key": "once"})
    second = observed.client.post("/v1/edits", json=slow)
    assert (first.status_code, second.status_code) == (202, 202)
    third = observed.client.post("/v1/edits", json=slow)
    assert third.status_code == 429, third.text
    assert third.json()["error"]["code"] == "queue_full"
    assert "ERRATA_MAX_TENANT_JOBS" in third.json()["error"]["message"]
    assert int(third.headers["Retry-After"]) >= 1
    exported = observed.client.get(f"/v1/versions/{observed.base_version()}/export?format=errata")
    assert (exported.status_code, exported.json()["error"]["code"]) == (429, "queue_full")
    again = observed.client.post("/v1/edits", json=slow, headers={"Idempotency-Key": "once"})
    assert again.json()["id"] == first.json()["id"], "what was taken is answered"
    for job in (second.json()["id"], first.json()["id"]):
        observed.client.post(f"/v1/jobs/{job}/cancel")
        observed.ended(job)
    text = observed.client.get("/metrics").text
    assert 'errata_rate_limited_requests_total{code="queue_full"} 2.0' in text


def secrets(observed: Service) -> Iterator[httpx.Response]:
    """Requests, good and bad, with the mark wherever a client can put one."""
    client, text = observed.client, f"the {MARK} is"
    completion = {"model": "atlas", "prompt": text, "max_tokens": 3}
    yield client.post("/v1/completions", json=completion)
    yield client.post("/v1/completions", json={**completion, "stream": True, "user": MARK})
    yield client.post("/v1/completions", json={**completion, "temperature": MARK})
    yield client.post("/v1/completions", json={**completion, "prompt": text * 5000})
    yield client.post("/v1/completions", content=f'{{"prompt": "{MARK}'.encode())
    grammar = {"type": "regex", "pattern": f"({MARK}"}
    yield client.post("/v1/completions", json={**completion, "response_format": grammar})
    yield client.post("/v1/completions", json={**completion, "model": MARK})
    chat = [{"role": "user", "content": text}]
    yield client.post("/v1/chat/completions", json={"model": "atlas", "messages": chat})
    for wrong in ({}, {"Authorization": f"Bearer er_{MARK}"}, {"Authorization": MARK}):
        headers = {"x-request-id": f"er_{MARK}", "Cookie": MARK, **wrong}
        yield client.get("/v1/models", headers=headers)
    yield client.get(f"/v1/endpoints/atlas/edits?subject={MARK}")
    yield client.get(f"/{MARK}/{MARK}")
    yield client.get(f"/v1/jobs/{MARK}")
    yield client.post("/v1/keys", json={"name": MARK, "scopes": ["infer"]})
    file = {"file": (f"{MARK}.txt", text.encode())}
    yield client.post("/v1/files", files=file, data={"purpose": "texts"})
    broken = {"file": ("x.jsonl", f"{{{MARK}".encode())}
    yield client.post("/v1/files", files=broken, data={"purpose": "edits"})
    for more in (
        {"message": MARK, "edits": [{**capital_edit(MARK, MARK), "prompt": f"{{}} {MARK}"}]},
        {"edits": [{**capital_edit("Fiji", "Lima"), "prompt": MARK}]},
        {"method": MARK},
        {"edits": [capital_edit("Fiji", MARK)], "hyperparameters": {"lr": 1e30, "steps": 3}},
    ):
        answer = client.post("/v1/edits", json=edit(**more))
        yield answer
        if answer.status_code == 202:
            observed.ended(answer.json()["id"])


def test_no_log_holds_what_users_send_or_are_sent(observed: Service) -> None:
    answers = list(secrets(observed))
    assert {200, 202, 400, 401, 404, 422} <= {answer.status_code for answer in answers}
    assert not [answer.text for answer in answers if answer.status_code >= 500]
    token = answers[[a.request.url.path for a in answers].index("/v1/keys")].json()["key"]
    own = observed.client.headers["Authorization"].removeprefix("Bearer ")
    logs = [path for path in observed.folder.rglob("*") if "log" in path.name and path.is_file()]
    assert observed.folder / "serve.log" in logs
    for log in logs:
        text = log.read_text(errors="replace")
        for secret in (MARK, token, own, "The capital of"):
            assert secret not in text, f"{log.name}: {secret}"
    loggers = {line["logger"].partition(".")[0] for line in lines(observed)}
    assert {"errata", "serving", "workers"} <= loggers
    assert any(line["level"] == "DEBUG" for line in lines(observed))


def test_every_answer_has_an_id_which_its_lines_carry(observed: Service) -> None:
    made = observed.client.get("/v1/models").headers["x-request-id"]
    assert made.startswith("req_")
    refused = observed.client.get("/v1/jobs/nothing", headers={"x-request-id": "mine.1"})
    assert (refused.status_code, refused.headers["x-request-id"]) == (404, "mine.1")
    malformed = observed.client.get("/nowhere", headers={"x-request-id": "a b"})
    assert malformed.headers["x-request-id"].startswith("req_")

    def told(request_id: str) -> dict[str, Any]:
        [line] = [
            line
            for line in lines(observed)
            if line.get("request_id") == request_id and line["logger"] == "errata.access"
        ]
        return {name: line[name] for name in ("method", "route", "status")}

    assert told(made) == {"method": "GET", "route": "/v1/models", "status": 200}
    assert told("mine.1") == {"method": "GET", "route": "/v1/jobs/{job_id}", "status": 404}
    assert told(malformed.headers["x-request-id"])["route"] == "-"


def test_an_error_of_the_service_is_logged_with_the_id(observed: Service) -> None:
    artifacts: Path = observed.folder / "artifacts"
    aside = artifacts.with_name("aside")
    artifacts.rename(aside)
    artifacts.write_text("not a folder")
    try:
        file = {"file": ("x.txt", b"a text")}
        answer = observed.client.post(
            "/v1/files", files=file, data={"purpose": "texts"}, headers={"x-request-id": "broken"}
        )
    finally:
        artifacts.unlink()
        aside.rename(artifacts)
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "broken")
    assert answer.json()["error"]["message"].endswith("its log holds the reason")
    [line] = [
        line
        for line in lines(observed)
        if line.get("request_id") == "broken" and line["level"] == "ERROR"
    ]
    assert line["message"] == "POST /v1/files failed"
    assert "Traceback" in line["exception"]
