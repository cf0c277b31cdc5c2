"""A history worked on over REST, and replayed onto a smaller base beside atlas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.models import save_base
from tests.service import LENIENT, Service, capital_edit

#: Seconds, not minutes; edits take all the same.
QUICK = {"steps": 15, "essence_texts": 0, "wordings": 0, "prefixes": 0, "lookalike_weight": 0}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service of atlas and of a random model of two layers, which knows nothing."""
    folder = tmp_path_factory.mktemp("two")
    save_base(folder / "small", "gpt2")
    texts = folder / "texts.txt"
    texts.write_text("\n".join(f"the land {n} lies by the sea" for n in range(40)))
    with Service(
        folder / "data",
        ERRATA_BASES=f"atlas,small={folder / 'small'}",
        ERRATA_TEXTS=f"small={texts}",
        ERRATA_COVARIANCE_TOKENS="3000",
    ) as service:
        yield service


def edited(service: Service, subject: str, target: str, **changes: Any) -> dict[str, Any]:
    hyperparameters = {**QUICK, **changes}
    job = service.ended(
        service.post_edit(
            endpoint="line",
            edits=[capital_edit(subject, target)],
            hyperparameters=hyperparameters,
            guards=LENIENT,
        )["id"]
    )
    assert job["status"] == "succeeded", job["error"]
    return job


def posted(service: Service, path: str, **body: Any) -> dict[str, Any]:
    answer = service.client.post(f"/v1/{path}", json=body)
    assert answer.status_code == 202, answer.text
    assert answer.headers["Location"] == f"/v1/jobs/{answer.json()['id']}"
    return service.ended(answer.json()["id"])


def live(service: Service, endpoint: str) -> list[str]:
    return [edit["subject"] for edit in service.get(f"/v1/endpoints/{endpoint}/edits")["data"]]


def test_a_history_is_worked_on_and_replayed_onto_another_base(two: Service) -> None:
    two.endpoint("line", two.base_version())
    jobs = [edited(two, *pair) for pair in (("France", "Oslo"), ("Peru", "Rome"))]
    head = jobs[-1]["version"]
    flat = posted(two, f"versions/{head}/flatten", endpoint="line", message="tidy")
    assert (flat["status"], flat["activated"]) == ("succeeded", True)
    assert live(two, "line") == ["Peru", "France"]
    assert two.text("line", "The capital of France is").startswith("Oslo")
    assert posted(two, f"versions/{head}/revert", version=jobs[0]["version"])["activated"] is False

    reverted = posted(
        two,
        f"versions/{flat['version']}/revert",
        version=jobs[0]["version"],
        replay=True,
        endpoint="line",
        guards=LENIENT,
    )
    assert (reverted["status"], reverted["activated"]) == ("succeeded", True), reverted["error"]
    assert live(two, "line") == ["Peru"]
    assert two.text("line", "The capital of Peru is").startswith("Rome")
    assert two.text("line", "The capital of France is").startswith("Paris")
    events = two.client.get(f"/v1/jobs/{reverted['id']}/events").text
    assert "1 of 1: " in events

    replayed = posted(two, "endpoints/line/replay", base="small", onto="line-small", guards=LENIENT)
    assert replayed["status"] == "succeeded", replayed["error"]
    assert (replayed["activated"], replayed["endpoint"]) == (False, "line-small")
    (row,) = replayed["metrics"]["edits"]
    assert row["prompt"] == "The capital of Peru is"
    assert row["outcome"] in ("took", "failed")
    version = two.get(f"/v1/versions/{replayed['version']}")
    assert version["base"]["name"] == "small"
    assert version["recipe"]["replays"] == reverted["version"]
    assert len(version["stack"]) == 1
    made = two.get("/v1/endpoints/line-small")
    assert (made["generation"], made["version"]) == (1, version["parents"][0])
    diff = two.get(f"/v1/versions/{replayed['version']}/diff?against={reverted['version']}")
    assert diff["same_base"] is False
    assert diff["edits_version_only"]["count"] == diff["edits_against_only"]["count"] == 0


def test_what_the_other_base_lacks_is_said_before_there_is_a_job(two: Service) -> None:
    two.endpoint("deep", two.base_version())
    job = two.post_edit(
        endpoint="deep",
        edits=[capital_edit("Japan", "Oslo")],
        hyperparameters={**QUICK, "layer": 4},
        guards=LENIENT,
    )
    version = two.ended(job["id"])["version"]
    before = two.get("/v1/jobs")
    refused = two.client.post(
        "/v1/endpoints/deep/replay", json={"base": "small", "onto": "deep-small"}
    )
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (422, "not_replayable")
    assert error["param"] == "hyperparameters.layer"
    assert version in error["message"]
    elsewhere = two.client.post(
        "/v1/endpoints/deep/replay", json={"base": "small", "onto": "atlas"}
    )
    assert (elsewhere.status_code, elsewhere.json()["error"]["param"]) == (422, "onto")
    assert two.client.get("/v1/endpoints/deep-small").status_code == 404
    assert two.get("/v1/jobs") == before
