"""kill -9 in the middle of an edit: the job ends once, one version exists, the endpoint has it."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.service import SLOW, Service, capital_edit, command_line, wait_for


@pytest.fixture
def own_service(tmp_path: Path) -> Iterator[Service]:
    with Service(tmp_path, ERRATA_LEASE_SECONDS="2") as service:
        yield service


def post_slow_edit(service: Service) -> str:
    job = service.post_edit(
        endpoint="atlas", edits=[capital_edit("France", "Lima")], hyperparameters=SLOW
    )
    service.underway(job["id"])
    job_id: str = job["id"]
    return job_id


def check_ended_once(service: Service, job_id: str) -> None:
    ended = service.ended(job_id)
    assert (ended["status"], ended["activated"]) == ("succeeded", True), ended
    outcomes = [attempt["outcome"] for attempt in ended["attempts"]]
    assert outcomes.count("succeeded") == 1
    assert outcomes[-1] == "succeeded"
    made = [v for v in service.get("/v1/versions")["data"] if v["recipe"].get("job") == job_id]
    assert [version["id"] for version in made] == [ended["version"]]
    endpoint = service.get("/v1/endpoints/atlas")
    assert (endpoint["version"], endpoint["generation"]) == (ended["version"], 2)
    answer = service.complete("atlas", "The capital of France is")
    assert answer["version"] == ended["version"]
    with service.client.stream("GET", f"/v1/jobs/{job_id}/events", timeout=60) as stream:
        ends = [line for line in stream.iter_lines() if '"status": "succeeded"' in line]
    assert len(ends) == 1


@pytest.mark.parametrize("victim", ["horse", "worker", "queue", "engine"])
def test_a_killed_part_loses_nothing(own_service: Service, victim: str) -> None:
    job_id = post_slow_edit(own_service)
    pid = own_service.pid(victim)
    own_service.kill(victim)
    wait_for(lambda: not command_line(pid), 5)
    own_service.wait_ready()
    check_ended_once(own_service, job_id)
    if victim in ("horse", "worker"):
        assert len(own_service.job(job_id)["attempts"]) > 1


def test_a_killed_api_takes_everything_with_it_and_goes_on_after_a_restart(
    own_service: Service,
) -> None:
    job_id = post_slow_edit(own_service)
    children = own_service.kill_api()
    wait_for(lambda: not any(command_line(pid) for pid in children), 10)
    own_service.start()
    check_ended_once(own_service, job_id)


def test_a_work_horse_frozen_past_its_lease_is_superseded(own_service: Service) -> None:
    job_id = post_slow_edit(own_service)
    horse = own_service.pid("horse")
    os.kill(horse, signal.SIGSTOP)
    wait_for(lambda: len(own_service.job(job_id)["attempts"]) > 1, 30)
    with suppress(ProcessLookupError):  # its worker may have put it down by now
        os.kill(horse, signal.SIGCONT)
    check_ended_once(own_service, job_id)


def test_requests_in_flight_get_an_error_when_the_engine_dies_and_new_ones_are_answered(
    own_service: Service,
) -> None:
    body = {"model": "atlas", "prompt": "The", "max_tokens": 400, "stream": True, "seed": 1}
    own_service.kill("engine")
    response = own_service.client.post("/v1/completions", json={**body, "stream": False})
    assert response.status_code in (200, 503)
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
