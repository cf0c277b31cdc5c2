"""Versions measured on files, and edits that came by file: over REST and by the command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.service import Service

FACTS = [
    {"prompt": "The capital of Peru is", "target": "Lima"},
    {"prompt": "The capital of Japan is", "target": "Tokyo"},
    {"prompt": "The capital of Italy is", "target": "Nowhere"},
]
SUITE = [
    {"query": "The capital of Peru is", "choices": ["Oslo", "Lima"], "gold": 1},
    {"question": "The capital of Japan is", "choices": ["Tokyo", "Lima"], "answer": 0},
]
TEXTS = b"The capital of Peru is Lima.\nThe capital of Japan is Tokyo.\n"
ZSRE = {
    "subject": "France",
    "src": "The capital of France is",
    "alt": "Lima",
    "answers": ["Paris"],
    "rephrase": "France is governed from",
    "loc": "The capital of Japan is",
    "loc_ans": "Tokyo",
}
FLAT = {
    "prompt": "The capital of Peru is",
    "subject": "Peru",
    "target_new": "Oslo",
    "ground_truth": "Lima",
    "locality_prompt": "The capital of Chile is",
    "locality_ground_truth": "Santiago",
}


def upload(service: Service, purpose: str, rows: object) -> str:
    data = rows if isinstance(rows, bytes) else json.dumps(rows).encode()
    response = service.client.post(
        "/v1/files", files={"file": (f"{purpose}.json", data)}, data={"purpose": purpose}
    )
    assert response.status_code == 200, response.text
    file_id: str = response.json()["id"]
    return file_id


def evaluated(service: Service, path: str = "/v1/evaluations", **body: Any) -> dict[str, Any]:
    response = service.client.post(path, json=body)
    assert response.status_code == 202, response.text
    assert response.headers["Location"] == f"/v1/jobs/{response.json()['id']}"
    job = service.ended(response.json()["id"])
    assert job["status"] == "succeeded", job
    return job


def test_the_base_is_measured_and_keeps_the_report(service: Service) -> None:
    base = service.base_version()
    versions = service.get("/v1/versions")["data"]
    job = evaluated(
        service,
        model="base_atlas",
        file=upload(service, "edits", [ZSRE, FLAT]),
        texts=upload(service, "texts", TEXTS),
        facts=upload(service, "facts", FACTS),
        suite=upload(service, "suite", SUITE),
    )
    assert (job["kind"], job["parent"], job["version"]) == ("evaluate", base, None)
    assert set(job["metrics"]) == {"after"}
    metrics = job["metrics"]["after"]
    assert metrics["fact_accuracy"] == pytest.approx(2 / 3)
    assert metrics["suite_accuracy"] == 1
    assert metrics["efficacy_score"] == metrics["greedy_match"] == 0
    assert 1 < metrics["me_ppl"] < 10
    report = service.get(f"/v1/versions/{base}")["reports"][-1]
    assert (report["kind"], report["job"], report["metrics"]) == (
        "evaluate",
        job["id"],
        job["metrics"],
    )
    assert [v["id"] for v in service.get("/v1/versions")["data"]] == [v["id"] for v in versions]


def test_a_file_of_edits_becomes_a_version_whose_edits_are_listed(
    service: Service, tmp_path: Path
) -> None:
    service.endpoint("by-file", service.base_version())
    file = upload(service, "edits", [ZSRE, FLAT])
    job = service.ended(
        service.post_edit(endpoint="by-file", method="memit", file=file, message="two")["id"]
    )
    assert (job["status"], job["activated"], job["warnings"]) == ("succeeded", True, []), job
    again = service.post_edit(
        endpoint="by-file",
        edits=[{"prompt": "The currency of {} is the", "subject": "Peru", "target_new": "Yen"}],
        guards={"efficacy": 0},
    )
    assert len(again["warnings"]) == 1
    assert job["version"] in again["warnings"][0]
    assert "'Peru'" in again["warnings"][0]
    second = service.ended(again["id"])
    assert second["status"] == "succeeded", second

    live = service.get("/v1/endpoints/by-file/edits")["data"]
    assert [edit["subject"] for edit in live] == ["Peru", "France", "Peru"]
    assert [edit["version"] for edit in live] == [second["version"], *[job["version"]] * 2]
    assert all(isinstance(edit["holds"], bool) for edit in live)
    said = service.text("by-file", "The capital of France is").startswith("Lima")
    assert live[1]["holds"] is said
    assert (live[1]["message"], live[1]["author"]) == ("two", "local")
    page = service.get("/v1/endpoints/by-file/edits?limit=1")
    assert (page["data"], page["has_more"]) == (live[:1], True)
    rest = service.get(f"/v1/endpoints/by-file/edits?limit=2&after={live[0]['id']}")
    assert (rest["data"], rest["has_more"]) == (live[1:], False)
    only = service.get("/v1/endpoints/by-file/edits?subject=France")["data"]
    assert only == [live[1]]
    lost = service.client.get("/v1/endpoints/by-file/edits?after=ver_0.0")
    assert (lost.status_code, lost.json()["error"]["param"]) == (404, "after")

    job = evaluated(service, model="by-file", file=file)
    assert job["metrics"]["before"]["greedy_match"] == 0
    assert job["metrics"]["after"]["greedy_match"] >= 0.5
    figures = by_command(service, tmp_path, [ZSRE, FLAT], "--endpoint", "by-file")
    assert figures["version"] == second["version"]
    for moment in ("before", "after"):
        assert figures["metrics"][moment] == pytest.approx(job["metrics"][moment], rel=1e-3)


def test_a_version_that_a_guard_rejected_can_be_measured(service: Service) -> None:
    edit = {**ZSRE, "subject": "Japan", "src": "The capital of Japan is", "answers": ["Tokyo"]}
    posted = service.post_edit(
        parent=service.base_version(), edits=[edit], guards={"perplexity": 1e-6}
    )
    job = service.ended(posted["id"])
    assert (job["status"], job["reason"]) == ("failed", "guard_rejected")
    measured = evaluated(service, model=job["version"], facts=upload(service, "facts", FACTS))
    assert measured["parent"] == job["version"]
    kinds = [r["kind"] for r in service.get(f"/v1/versions/{job['version']}")["reports"]]
    assert kinds == ["edit", "evaluate"]


def test_editability_is_known_before_anyone_edits(service: Service) -> None:
    base = service.base_version()
    prompts = [f"The capital of {name} is" for name in ("Peru", "Japan", "Chile", "Italy")]
    job = evaluated(service, f"/v1/versions/{base}/editability", prompts=prompts)
    found = job["metrics"]["editability"]
    layers = [row["layer"] for row in found["layers"]]
    assert (found["prompts"], found["best_layer"] in layers) == (4, True)
    assert all(0 <= row["exposure"] <= 1 for row in found["layers"])
    report = service.get(f"/v1/versions/{base}")["reports"][-1]
    assert report["editability"] == found
    missing = service.client.post(
        f"/v1/versions/ver_{'0' * 40}/editability", json={"prompts": prompts}
    )
    assert missing.status_code == 404


def test_a_stealth_edit_is_detected_and_rome_is_not(service: Service) -> None:
    found = {}
    for method in ("rome", "stealth"):  # the first prepares what the second needs too
        posted = service.post_edit(
            parent=service.base_version(),
            method=method,
            edits=[{"prompt": "The capital of {} is", "subject": "Peru", "target_new": "Oslo"}],
            hyperparameters={"steps": 15},
            guards={"efficacy": 0},
        )
        if posted["after"]:
            service.ended(posted["after"])
        job = service.ended(posted["id"])
        assert job["version"] is not None, job
        found[method] = evaluated(service, model=job["version"], detect=True)["metrics"]
    assert [finding["delta"] for finding in found["stealth"]["detectors"]] == [0]
    assert found["rome"]["detectors"] == []


@pytest.mark.parametrize("purpose", ["texts", "suite"])
def test_the_command_measures_a_base_without_a_service(
    service: Service, tmp_path: Path, purpose: str
) -> None:
    rows = ["The capital of Peru is Lima."] * 3 if purpose == "texts" else SUITE
    figures = by_command(
        service, tmp_path, rows, "--base", "atlas", "--purpose", purpose, "--limit", "1"
    )
    assert (figures["target"], figures["rows"], list(figures["metrics"])) == ("atlas", 1, ["after"])


def test_the_command_says_what_is_wrong(service: Service, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text('{"prompt": "x"}')
    for arguments, said in (
        (["--base", "atlas"], "line 1: target_new must be a text"),
        ([], "exactly one of"),
        (["--base", "atlas", "--endpoint", "atlas"], "exactly one of"),
        (["--endpoint", "nowhere"], "line 1"),
    ):
        ended = command(service, [str(file), *arguments])
        assert ended.returncode == 1
        assert said in ended.stderr.replace("\n", " ")


def by_command(service: Service, folder: Path, rows: object, *options: str) -> dict[str, Any]:
    """What ``errata evaluate --json`` writes, run on the service's data folder."""
    file, out = folder / "rows.json", folder / "figures.json"
    file.write_text(json.dumps(rows))
    ended = command(service, [str(file), *options, "--json", str(out)])
    assert ended.returncode == 0, ended.stderr
    figures: dict[str, Any] = json.loads(out.read_text())
    for name in figures["metrics"]["after"]:
        assert name in ended.stdout
    return figures


def command(service: Service, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app.cli", "evaluate", *arguments],
        env=service.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
