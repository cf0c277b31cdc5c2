"""Versions edited apart are merged over REST: the edits of both are served by the result."""

from __future__ import annotations

from typing import Any

import pytest

from tests.service import LENIENT, Service, capital_edit

FIRST = {"France": ("Lima", "Paris"), "Japan": ("Oslo", "Tokyo")}
SECOND = {"Chile": ("Cairo", "Santiago"), "Egypt": ("Rome", "Cairo")}


def edited(service: Service, facts: dict[str, tuple[str, str]]) -> str:
    edits = [capital_edit(subject, *targets) for subject, targets in facts.items()]
    posted = service.post_edit(parent=service.base_version(), edits=edits, guards=LENIENT)
    job = service.ended(posted["id"])
    assert job["status"] == "succeeded", job
    assert job["metrics"]["after"]["greedy_match"] == 1
    version: str = job["version"]
    return version


def merged(service: Service, **body: Any) -> dict[str, Any]:
    response = service.client.post("/v1/merges", json=body)
    assert response.status_code == 202, response.text
    return service.ended(response.json()["id"])


@pytest.fixture(scope="module")
def two(service: Service) -> tuple[str, str]:
    return edited(service, FIRST), edited(service, SECOND)


def test_the_edits_of_both_are_served(service: Service, two: tuple[str, str]) -> None:
    service.endpoint("merged", two[0])
    job = merged(
        service,
        versions=[{"id": two[0]}, {"id": two[1], "weight": 1.0, "layer_weights": {"5": 0.5}}],
        method="concatenation",
        endpoint="merged",
        message="both teams'",
    )
    assert (job["kind"], job["status"], job["activated"]) == ("merge", "succeeded", True), job
    for own, version in zip(job["metrics"]["inputs"], two, strict=True):
        assert (own["version"], own["held"], own["survived"], own["lost"]) == (version, 2, 2, [])
    for subject, (target, _) in {**FIRST, **SECOND}.items():
        assert service.text("merged", f"The capital of {subject} is").startswith(target)
    assert service.text("merged", "The capital of Peru is").startswith("Lima")
    version = service.get(f"/v1/versions/{job['version']}")
    assert (version["parents"], len(version["stack"])) == ([*two], 1)
    assert version["recipe"]["versions"][1]["layer_weights"] == {"5": 0.5}
    assert {guard["name"]: guard["result"] for guard in job["guards"]}["efficacy"] == "passed"
    history = service.get("/v1/endpoints/merged/history")["data"]
    assert (history[0]["job"], history[0]["message"]) == (job["id"], "both teams'")


def test_what_contradicts_is_named(service: Service, two: tuple[str, str]) -> None:
    other = edited(service, {"France": ("Bern", "Paris")})
    job = merged(
        service,
        versions=[{"id": two[0]}, {"id": other}],
        method="ties",
        hyperparameters={"density": 1},
        rank=2,
        guards=LENIENT,
    )
    assert (job["status"], job["activated"]) == ("succeeded", False), job
    conflicts = job["metrics"]["conflicts"]
    (named,) = conflicts["edits"]["listed"]
    assert (named["subject"], named["same_prompt"]) == ("France", True)
    assert [edit["target_new"] for edit in named["edits"]] == ["Lima", "Bern"]
    assert 0 < conflicts["sign_disagreement"] < 1
    kept = sum(own["survived"] for own in job["metrics"]["inputs"])
    lost = sum(len(own["lost"]) for own in job["metrics"]["inputs"])
    assert (kept + lost, lost >= 1) == (3, True)
    assert 0 < job["metrics"]["residual"]["energy"] < 1
    response = service.client.post(
        "/v1/merges/preview", json={"versions": [{"id": two[0]}, {"id": other}]}
    )
    preview = service.ended(response.json()["id"])
    assert preview["metrics"] == {"conflicts": conflicts}
