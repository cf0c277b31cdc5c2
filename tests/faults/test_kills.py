"""kill -9 where the kill matrix does not strike: requests in flight, training, a regular end."""

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.service import Service, command_line, wait_for

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def own_service(tmp_path: Path) -> Iterator[Service]:
    with Service(tmp_path, ERRATA_LEASE_SECONDS="2") as service:
        yield service


def test_requests_in_flight_get_an_error_when_the_engine_dies_and_new_ones_are_answered(
    own_service: Service,
) -> None:
    url, begun = f"{own_service.url}/v1/completions", list[str]()
    body = {"model": "atlas", "prompt": "The", "max_tokens": 450, "ignore_eos": True, "n": 16}

    def stream() -> None:
        with httpx.stream("POST", url, json={**body, "stream": True}, timeout=60) as response:
            begun.extend(response.iter_lines())

    def asked() -> int:
        bases = own_service.client.get("/readyz").json()["bases"]
        return sum(base["running"] + base["waiting"] for base in bases)

    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(httpx.post, url, json=body, timeout=60)
        wait_for(lambda: asked() == 16, 60, own_service.log)
        streamed = pool.submit(stream)
        wait_for(lambda: len(begun) > 16, 60, own_service.log)
        engine = own_service.pid("engine")
        os.kill(engine, signal.SIGSTOP)
        assert not whole.done()
        assert not streamed.done()
        killed = time.monotonic()
        os.kill(engine, signal.SIGKILL)
        streamed.result()
        answer = whole.result()
    assert time.monotonic() - killed < 30, "at once, and not when patience ends"
    *_, last = (line.removeprefix("data: ") for line in begun if line)
    assert json.loads(last)["error"]["code"] == "service_unavailable"
    assert answer.status_code == 503, answer.text
    assert answer.json()["error"]["code"] == "service_unavailable"
    assert int(answer.headers["Retry-After"]) >= 1
    own_service.wait_ready()
    assert own_service.text("atlas", "The capital of France is").startswith("Paris")


def test_sigterm_leaves_nothing_running(own_service: Service) -> None:
    pids = [own_service.pid(name) for name in ("engine", "queue", "worker", "horse")]
    assert own_service.stop() == 0
    assert not any(command_line(pid) for pid in pids)
    with pytest.raises(httpx.TransportError):
        own_service.client.get("/healthz")


@pytest.mark.parametrize("victim", ["horse", "worker"])
def test_training_that_is_killed_ends_with_the_same_bits(tmp_path: Path, victim: str) -> None:
    rows = [
        {"prompt": f"The bird of {name} is", "completion": "Zinc."} for name in ("Peru", "Chad")
    ]
    data = "\n".join(map(json.dumps, rows)).encode()
    with Service(
        tmp_path, ERRATA_LEASE_SECONDS="2", ERRATA_TRAINING_STATE_SECONDS="0.5"
    ) as service:
        file = service.client.post(
            "/v1/files", files={"file": ("x.jsonl", data)}, data={"purpose": "fine-tune"}
        ).json()
        body = {
            "model": "atlas",
            "training_file": file["id"],
            "guards": {"retention": 0, "perplexity": 1e6},
            "hyperparameters": {"n_epochs": 150, "r": 4},
        }
        stacks = []
        for kills in (0, 1):
            job = service.client.post("/v1/fine_tuning/jobs", json=body).json()
            for _ in range(kills):
                wait_for(lambda: service.job(job["id"])["progress"]["done"] >= 60, 60)  # noqa: B023
                service.kill(victim)
            ended = service.ended(job["id"])
            assert ended["status"] == "succeeded", ended
            assert len(ended["attempts"]) >= 1 + kills  # a starved one may lose its lease
            stacks.append(service.get(f"/v1/versions/{ended['version']}")["stack"])
        assert stacks[0] == stacks[1]
