"""Garbage is collected in the middle of real jobs, and of one whose worker is killed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.artifacts import ArtifactStore
from registry.database import Database
from registry.garbage import Collector
from tests.service import LENIENT, SLOW, Service, capital_edit, wait_for

pytestmark = pytest.mark.timeout(900)

GRACE = 3.0  # seconds, longer than any write is under way


@pytest.fixture
def own_service(tmp_path: Path) -> Iterator[Service]:
    settings = {"ERRATA_LEASE_SECONDS": "2", "ERRATA_TRAINING_STATE_SECONDS": "0.5"}
    with Service(tmp_path, **settings) as service:
        yield service


def sweep(service: Service) -> int:
    """Collect, when everything that was put so far is older than the grace time.

    Nothing is made to look older than it is: what a job put a moment ago has no row yet.
    """
    time.sleep(GRACE)
    database = Database(f"sqlite:///{service.folder / 'registry.db'}")
    try:
        return Collector(database, ArtifactStore(service.folder / "artifacts")).collect(GRACE).count
    finally:
        database.close()


def upload(service: Service, data: bytes, purpose: str) -> str:
    answer = service.client.post(
        "/v1/files", files={"file": ("x.jsonl", data)}, data={"purpose": purpose}
    )
    file_id: str = answer.json()["id"]
    return file_id


def test_an_edit_goes_on_over_a_kill_while_garbage_goes(own_service: Service) -> None:
    texts = upload(own_service, b"The capital of Peru is Lima.\nIt is so.", "texts")
    lonely = upload(own_service, b"nobody wants this text", "texts")
    own_service.client.delete(f"/v1/files/{lonely}")
    job = own_service.post_edit(
        endpoint="atlas",
        edits=[capital_edit("France", "Lima")],
        hyperparameters=SLOW,
        guards={**LENIENT, "texts": texts},
    )
    own_service.underway(job["id"])
    assert sweep(own_service) == 2  # what the deleted file was, and what it was read as
    own_service.kill("horse")
    wait_for(lambda: len(own_service.job(job["id"])["attempts"]) > 1, 60)
    sweep(own_service)
    ended = own_service.ended(job["id"])
    assert (ended["status"], ended["activated"]) == ("succeeded", True), ended
    assert own_service.client.delete(f"/v1/files/{texts}").status_code == 200
    sweep(own_service)
    own_service.kill("engine")
    own_service.wait_ready()
    answer = own_service.complete("atlas", "The capital of France is")
    assert answer["version"] == ended["version"]
    (edit,) = own_service.get("/v1/endpoints/atlas/edits")["data"]
    assert edit["subject"] == "France"

    own_service.client.post("/v1/endpoints/atlas/rollback")
    (delta,) = own_service.get(f"/v1/versions/{ended['version']}")["stack"]
    store = ArtifactStore(own_service.folder / "artifacts")
    sweep(own_service)
    assert store.holds(delta)
    assert own_service.client.delete(f"/v1/versions/{ended['version']}").status_code == 200
    sweep(own_service)
    assert not store.holds(delta)
    again = own_service.post_edit(endpoint="atlas", edits=[capital_edit("Peru", "Oslo")])
    assert own_service.ended(again["id"])["status"] == "succeeded"


def test_training_goes_on_from_its_state_while_garbage_goes(own_service: Service) -> None:
    rows = [
        {"prompt": f"The bird of {name} is", "completion": "Zinc."} for name in ("Peru", "Chad")
    ]
    file = upload(own_service, "\n".join(map(json.dumps, rows)).encode(), "fine-tune")
    body = {
        "model": "atlas",
        "training_file": file,
        "guards": {"retention": 0, "perplexity": 1e6},
        "hyperparameters": {"n_epochs": 150, "r": 4},
    }
    job = own_service.client.post("/v1/fine_tuning/jobs", json=body).json()
    wait_for(lambda: own_service.job(job["id"])["progress"]["done"] >= 30, 180)
    sweep(own_service)
    own_service.kill("horse")
    sweep(own_service)
    ended = own_service.ended(job["id"])
    assert ended["status"] == "succeeded", ended
    assert len(ended["attempts"]) >= 2  # a starved one may lose its lease besides
    sweep(own_service)
    assert own_service.complete(ended["version"], "The bird of Peru is")["version"]
    (curves,) = ended["result_files"]
    assert own_service.client.get(f"/v1/files/{curves}/content").status_code == 200
