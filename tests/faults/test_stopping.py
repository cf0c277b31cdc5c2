"""Parts that hang show in /readyz, which stays fast; a service that stops ends what it began."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from registry.attempts import attempts
from tests.service import LENIENT, SLOW, Service, capital_edit, command_line, wait_for

pytestmark = pytest.mark.timeout(900)

STREAM = {"model": "atlas", "prompt": "The", "stream": True, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("stopping")
    settings = {"ERRATA_STOP_SECONDS": "40", "ERRATA_COVARIANCE_TOKENS": "3000"}
    with Service(folder, **settings) as service:
        yield service


@contextmanager
def frozen(service: Service, name: str) -> Iterator[None]:
    pid = service.pid(name)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def locked(service: Service, _: str) -> Iterator[None]:
    holder = sqlite3.connect(service.folder / "registry.db", isolation_level=None, timeout=30)
    try:
        holder.execute("BEGIN IMMEDIATE")
        yield
    finally:
        holder.close()


@contextmanager
def replaced(service: Service, _: str) -> Iterator[None]:
    artifacts = service.folder / "artifacts"
    artifacts.mkdir(exist_ok=True)
    artifacts.rename(service.folder / "aside")
    artifacts.touch()
    try:
        yield
    finally:
        artifacts.unlink()
        (service.folder / "aside").rename(artifacts)


@pytest.mark.parametrize(
    ("part", "broken", "process"),
    [
        ("engine", frozen, "engine"),
        ("queue", frozen, "queue"),
        ("workers", frozen, "worker"),
        ("database", locked, ""),
        ("artifacts", replaced, ""),
    ],
)
def test_a_part_that_does_not_answer_is_named_and_comes_back(
    own: Service, part: str, broken: Callable[..., Any], process: str
) -> None:
    own.wait_ready()

    def named() -> bool:
        begun = time.monotonic()
        answer = own.client.get("/readyz")
        assert time.monotonic() - begun < 10, "seconds, not the part's own patience"
        told = answer.json()
        assert (answer.status_code == 200) is told["ready"] is (told["reasons"] == {})
        return part in told["reasons"]

    with broken(own, process):
        wait_for(named, 60, own.log)
        assert own.client.get("/healthz").status_code == 200
        text = own.client.get("/metrics").text
        assert ("errata_engine_up 0.0" in text) is (part == "engine")
    own.wait_ready()
    assert f"not ready: {part}: " in own.log()


def streamed(service: Service, begun: list[str], **more: Any) -> list[dict[str, Any]]:
    """A stream's chunks, whole or not; each line is in ``begun`` as it comes."""
    url, body = f"{service.url}/v1/completions", {**STREAM, **more}
    with httpx.stream("POST", url, json=body, timeout=60) as answer:
        assert answer.status_code == 200
        begun.extend(answer.iter_lines())
    data = [line.removeprefix("data: ") for line in begun if line.startswith("data: ")]
    return [{"done": True} if chunk == "[DONE]" else json.loads(chunk) for chunk in data]


def test_a_stream_that_runs_ends_whole_and_nothing_new_is_taken(own: Service) -> None:
    own.wait_ready()
    begun: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(streamed, own, begun, max_tokens=400, n=4)
        wait_for(lambda: len(begun) > 20, 60, own.log)
        os.kill(own.pid("engine"), signal.SIGSTOP)  # so that the stream outlives what is asked here
        own.tell_to_stop()
        wait_for(lambda: own.client.get("/readyz").status_code == 503, 60, own.log)
        told = own.client.get("/readyz").json()
        refused = own.client.get("/v1/models")
        os.kill(own.pid("engine"), signal.SIGCONT)
        chunks = stream.result()
        assert own.wait_ended() == 0
    assert "stopping" in told["reasons"]["service"]
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "service_stopping"
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.headers["Connection"] == "close"
    assert chunks[-1] == {"done": True}
    reasons = [c["choices"][0]["finish_reason"] for c in chunks[:-1]]
    assert [reason for reason in reasons if reason] == ["length"] * 4


def test_what_does_not_end_in_time_is_told_so_and_the_attempt_runs_again(own: Service) -> None:
    own._settings["ERRATA_STOP_SECONDS"] = "1"
    own.start()
    body = {"endpoint": "atlas", "edits": [capital_edit("France", "Lima")], "guards": LENIENT}
    job = own.post_edit(**body, hyperparameters={**SLOW, "steps": 300})
    own.underway(job["id"])
    begun: list[str] = []
    whole = {**STREAM, "stream": False, "max_tokens": 400, "n": 8}
    with ThreadPoolExecutor(3) as pool:
        stream = pool.submit(streamed, own, begun, max_tokens=400, n=8)
        waiting = pool.submit(httpx.post, f"{own.url}/v1/completions", json=whole, timeout=60)
        events = pool.submit(httpx.get, f"{own.url}/v1/jobs/{job['id']}/events", timeout=60)
        wait_for(lambda: len(begun) > 16, 60, own.log)
        os.kill(own.pid("engine"), signal.SIGSTOP)
        own.tell_to_stop()
        chunks, answer, told = stream.result(), waiting.result(), events.result()
        os.kill(own.pid("engine"), signal.SIGCONT)
        assert own.wait_ended() == 0
    assert chunks[-1]["error"]["code"] == "service_stopping"
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "service_stopping"
    assert "event: error" in told.text
    assert "service_stopping" in told.text
    own._settings["ERRATA_STOP_SECONDS"] = "5"
    own.start()
    ended = own.ended(job["id"])
    assert ended["status"] == "succeeded", ended
    outcomes = [attempt["outcome"] for attempt in ended["attempts"]]
    assert outcomes == ["released", "succeeded"]


def test_however_often_it_is_told_to_stop_an_attempt_is_released(own: Service) -> None:
    own.stop()
    own._settings["ERRATA_STOP_SECONDS"] = "1"
    own.start()
    own.endpoint("hurried", own.base_version())
    body = {"endpoint": "hurried", "edits": [capital_edit("Peru", "Rome")], "guards": LENIENT}
    job = own.post_edit(**body, hyperparameters={**SLOW, "steps": 300})
    own.underway(job["id"])
    pid = own.pid("api")

    def has_ended() -> bool:
        own.tell_to_stop()
        return not command_line(pid)

    wait_for(has_ended, 60, own.log)
    assert own.wait_ended() == 0
    with own.database().read() as connection:
        assert [attempt["outcome"] for attempt in attempts(connection, job["id"])] == ["released"]


LATE_SIGNAL = """
import asyncio, signal

close = asyncio.Runner.close

def closed(self):
    signal.raise_signal(signal.SIGTERM)
    close(self)

asyncio.Runner.close = closed
"""


def test_a_signal_as_its_loop_closes_does_not_keep_it_from_ending(
    own: Service, tmp_path: Path
) -> None:
    own.stop()
    (tmp_path / "sitecustomize.py").write_text(LATE_SIGNAL)
    before = own._settings
    paths = filter(None, (str(tmp_path), os.environ.get("PYTHONPATH")))
    own._settings = {**before, "PYTHONPATH": os.pathsep.join(paths)}
    own.start()
    own._settings = before
    assert own.client.get("/v1/versions").status_code == 200  # it has threads that it must end
    assert own.stop() == 0


def test_a_service_that_cannot_go_on_stops_and_says_so(own: Service) -> None:
    """What nobody foresaw here is a job whose attempts are no number."""
    own.stop()
    own.start()
    own.post_edit(endpoint="atlas", edits=[capital_edit("Chad", "Oslo")])
    begun = len(own.log())
    with sqlite3.connect(own.folder / "registry.db", timeout=30) as connection:
        change = "UPDATE jobs SET status = 'queued', dispatched_at = NULL, attempt = 'x'"
        assert connection.execute(change).rowcount
    assert own.wait_ended() == 1
    told = own.log()[begun:]
    assert "CRITICAL errata.api: dispatch failed, and the service stops" in told
    assert "engine (pid" in told.partition("CRITICAL")[2], "it is stopped in order"
