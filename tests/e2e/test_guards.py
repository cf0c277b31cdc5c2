"""A destructive edit is rejected over REST, the endpoint stays, and only force moves it."""

from typing import Any

import pytest

from tests.service import Service, capital_edit

#: The last layer, where no subject is looked up, changed without a bound.
DESTRUCTIVE = {
    "layer": 5,
    "clamp": 10_000,
    "learning_rate": 10,
    "stop_loss": 1e-9,
    "decay": 0,
    "kl_factor": 0,
}


@pytest.fixture(scope="module")
def rejected(service: Service) -> dict[str, Any]:
    """The job of a destructive edit, and the endpoint's state before it."""
    service.endpoint("guarded", service.base_version())
    job = service.post_edit(
        endpoint="guarded",
        edits=[capital_edit("Peru", "Oslo", "Lima")],
        hyperparameters=DESTRUCTIVE,
    )
    return service.ended(job["id"])


def test_it_is_rejected_and_says_by_which_guard(service: Service, rejected: dict[str, Any]) -> None:
    assert (rejected["status"], rejected["reason"]) == ("failed", "guard_rejected")
    assert rejected["activated"] is False
    assert rejected["error"]["code"] == "guard_rejected"
    failed = {g["name"]: g for g in rejected["guards"] if g["result"] == "failed"}
    assert {"perplexity", "retention", "norm"} <= set(failed)
    assert failed["perplexity"]["value"] > failed["perplexity"]["limit"] == 1.1
    assert failed["retention"]["value"] < failed["retention"]["limit"] <= 1.0
    assert failed["retention"]["before"] > 0.9
    assert "'perplexity'" in rejected["error"]["message"]
    version = service.get(f"/v1/versions/{rejected['version']}")
    assert version["status"] == "rejected"


def test_the_endpoint_stays_and_refuses_the_version(
    service: Service, rejected: dict[str, Any]
) -> None:
    endpoint = service.get("/v1/endpoints/guarded")
    assert (endpoint["generation"], endpoint["version"]) == (1, service.base_version())
    assert service.text("guarded", "The capital of Peru is").startswith("Lima")
    refused = service.client.put(
        "/v1/endpoints/guarded", json={"version": rejected["version"]}, headers={"If-Match": '"1"'}
    )
    assert refused.status_code == 409
    error = refused.json()["error"]
    assert error["code"] == "version_rejected"
    assert "'perplexity'" in error["message"]
    assert "force" in error["message"]


def test_a_stale_force_overrides_nothing(service: Service, rejected: dict[str, Any]) -> None:
    stale = service.client.put(
        "/v1/endpoints/guarded",
        json={"version": rejected["version"], "force": True},
        headers={"If-Match": '"7"'},
    )
    assert stale.status_code == 412
    assert service.get(f"/v1/versions/{rejected['version']}")["status"] == "rejected"


def test_force_moves_it_and_is_on_record(service: Service, rejected: dict[str, Any]) -> None:
    forced = service.client.put(
        "/v1/endpoints/guarded",
        json={"version": rejected["version"], "force": True, "message": "to look at it"},
        headers={"If-Match": '"1"'},
    )
    assert forced.status_code == 200
    assert forced.json()["version"] == rejected["version"]
    version = service.get(f"/v1/versions/{rejected['version']}")
    assert version["status"] == "ready"
    override = version["reports"][-1]
    assert (override["kind"], override["actor"]) == ("override", "local")
    assert override["message"] == "to look at it"
    assert "perplexity" in {guard["name"] for guard in override["overridden"]}
    assert service.complete("guarded", "Peru")["version"] == rejected["version"]
    assert service.job(rejected["id"])["status"] == "failed"
