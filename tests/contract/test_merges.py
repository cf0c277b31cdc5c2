"""What a merge request must be: every refusal names the field and leaves no job behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from editing.deltas import Delta, Effect
from registry.bases import Base, find_bases
from registry.manifests import VersionManifest
from registry.versions import DELETED, READY, REJECTED, insert_version
from tests.models import random_effect
from tests.service import Service

PATH = "model.layers.1.mlp.down_proj"
HIDDEN, FFN = 256, 768


@dataclass
class Shelf:
    """Versions written into a service's data, as a worker would write them."""

    service: Service
    base: Base

    def version(
        self, seed: int, effect: Effect, status: str = READY, base: Base | None = None
    ) -> str:
        base = base or self.base
        data = Delta({PATH: effect}, base.digest, "test").to_bytes()
        digest = self.service.store().put(data)
        parent = VersionManifest(base.ref).id
        manifest = VersionManifest(base.ref, (digest,), (parent,), {"seed": seed})
        database = self.service.database()
        with database.write() as connection:
            version = insert_version(connection, "default", manifest, status=status)
        database.close()
        return version.id


@pytest.fixture(scope="module")
def named(service: Service) -> Iterator[dict[str, str]]:
    """Ids by what they are."""
    base = find_bases("atlas")["atlas"]
    shelf = Shelf(service, base)
    low_rank = random_effect(1, HIDDEN, FFN, "rank1")
    other = replace(base, digest="1" * 64)
    file = service.client.post(
        "/v1/files", files={"file": ("t.txt", b"A text.\n")}, data={"purpose": "texts"}
    ).json()
    ids = {
        "BASE": service.base_version(),
        "ONE": shelf.version(1, low_rank),
        "TWO": shelf.version(2, random_effect(2, HIDDEN, FFN, "dense")),
        "GATED": shelf.version(3, random_effect(3, HIDDEN, FFN, "gated")),
        "REPLACING": shelf.version(4, random_effect(4, HIDDEN, FFN, "replacing")),
        "REJECTED": shelf.version(5, low_rank, REJECTED),
        "DELETED": shelf.version(6, low_rank, DELETED),
        "OTHER": shelf.version(7, low_rank, base=other),
        "TEXTS": file["id"],
    }
    split = [{"version": ids["ONE"], "weight": 1}, {"version": ids["TWO"], "weight": 1}]
    response = service.client.put(
        "/v1/endpoints/split-for-merges", json={"split": split}, headers={"If-None-Match": "*"}
    )
    assert response.status_code == 201, response.text
    yield ids
    response = service.client.delete(
        "/v1/endpoints/split-for-merges", headers={"If-Match": response.headers["ETag"]}
    )
    assert response.is_success, response.text


def of(*ids: str, **changes: Any) -> dict[str, Any]:
    return {"versions": [{"id": id_} for id_ in ids], **changes}


def first(**changes: Any) -> dict[str, Any]:
    return {"versions": [{"id": "ONE", **changes}, {"id": "TWO"}]}


BAD: dict[str, tuple[dict[str, Any], int, str | None]] = {
    "no versions": ({"versions": []}, 422, "versions"),
    "versions left out": ({"method": "ties"}, 422, "versions"),
    "65 versions": (of(*(f"ver_{i}" for i in range(65))), 422, "versions"),
    "one version twice": (of("ONE", "ONE"), 422, None),
    "no such version": (of("ONE", "ver_0"), 422, "versions.1.id"),
    "a hostile id": (of("ONE", "../x"), 422, "versions.1.id"),
    "a gated version": (of("ONE", "GATED"), 422, "versions.1.id"),
    "a replacing version": (of("REPLACING", "ONE"), 422, "versions.0.id"),
    "a rejected version": (of("ONE", "TWO", "REJECTED"), 422, "versions.2.id"),
    "a deleted version": (of("ONE", "DELETED"), 422, "versions.1.id"),
    "another base": (of("ONE", "OTHER"), 422, "versions.1.id"),
    "unknown method": (of("ONE", "TWO", method="magic"), 422, "method"),
    "unknown hyperparameter": (
        of("ONE", "TWO", method="ties", hyperparameters={"dens": 1}),
        422,
        "hyperparameters.dens",
    ),
    "no density": (
        of("ONE", "TWO", method="dare", hyperparameters={"density": 0}),
        422,
        "hyperparameters.density",
    ),
    "probabilities above 1": (
        of("ONE", "TWO", method="della", hyperparameters={"density": 0.95}),
        422,
        "hyperparameters",
    ),
    "no sign to elect": (
        of("ONE", "TWO", method="dare", hyperparameters={"majority": "sum"}),
        422,
        "hyperparameters.majority",
    ),
    "a scale that is no number": (
        of("ONE", "TWO", hyperparameters={"scale": float("inf")}),
        422,
        "hyperparameters.scale",
    ),
    "an arc of three": (of("BASE", "ONE", "TWO", method="slerp"), 422, "versions"),
    "an arc of one": (of("ONE", method="slerp"), 422, "versions"),
    "an arc against a version": (
        {**first(weight=-1), "method": "slerp"},
        422,
        "versions.0.weight",
    ),
    "a mean with the old of none": (of("ONE", method="mos"), 422, "versions"),
    "weights of what has none": (
        {**first(weight=0.5), "method": "model_stock"},
        422,
        "versions.0.weight",
    ),
    "layers of what has none": (
        {**first(layer_weights={"1": 1}), "method": "mos"},
        422,
        "versions.0.layer_weights.1",
    ),
    "a weight that is no number": (first(weight=float("nan")), 422, "versions.0.weight"),
    "a layer out of reach": (first(layer_weights={"99": 1}), 422, "versions.0.layer_weights.99"),
    "a layer below": (first(layer_weights={"-1": 1}), 422, "versions.0.layer_weights.-1.[key]"),
    "no such facts": (first(facts="file-0"), 404, "versions.0.facts"),
    "facts of another purpose": (first(facts="TEXTS"), 422, "versions.0.facts"),
    "no such guard file": (of("ONE", guards={"suite": "file-0"}), 404, "guards.suite"),
    "no rank": (of("ONE", rank=0), 422, "rank"),
    "a seed below": (of("ONE", seed=-1), 422, "seed"),
    "no such endpoint": (of("ONE", endpoint="nowhere"), 404, "endpoint"),
    "a split endpoint": (of("ONE", endpoint="split-for-merges"), 422, "endpoint"),
    "unknown field": (of("ONE", metod="ties"), 422, "metod"),
    "unknown field of a version": (first(wieght=1), 422, "versions.0.wieght"),
}


def filled(body: Any, named: dict[str, str]) -> Any:
    """The body with the ids that its words stand for."""
    if isinstance(body, dict):
        return {key: filled(value, named) for key, value in body.items()}
    if isinstance(body, list):
        return [filled(value, named) for value in body]
    return named.get(body, body) if isinstance(body, str) else body


@pytest.mark.parametrize("path", ["/v1/merges", "/v1/merges/preview"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_merge_is_refused_and_leaves_no_job(
    service: Service, named: dict[str, str], name: str, path: str
) -> None:
    body, status, param = BAD[name]
    before = service.get("/v1/jobs")["data"]
    response = service.client.post(
        path,
        content=json.dumps(filled(body, named)),
        headers={"Content-Type": "application/json"},
    )
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] == param, error
    assert len(error["message"]) > 10
    assert service.get("/v1/jobs")["data"] == before


def test_the_gated_version_is_named(service: Service, named: dict[str, str]) -> None:
    response = service.client.post("/v1/merges", json=filled(of("ONE", "GATED"), named))
    error = response.json()["error"]
    assert error["code"] == "gated_version"
    assert named["GATED"] in error["message"]
    assert PATH in error["message"]


def test_a_preview_and_what_versions_have_in_common(
    service: Service, named: dict[str, str]
) -> None:
    body = filled(of("ONE", "TWO", "BASE", endpoint="atlas"), named)
    headers = {"Idempotency-Key": "preview"}
    posted, again = (
        service.client.post("/v1/merges/preview", json=body, headers=headers) for _ in range(2)
    )
    assert posted.status_code == 202, posted.text
    assert again.json()["id"] == posted.json()["id"]
    assert posted.headers["Location"] == f"/v1/jobs/{posted.json()['id']}"
    elsewhere = service.client.post("/v1/merges", json=body, headers=headers)
    assert elsewhere.status_code == 422, elsewhere.text
    assert "Idempotency-Key" in elsewhere.json()["error"]["message"]
    job = service.ended(posted.json()["id"])
    assert (job["kind"], job["status"], job["version"]) == ("merge_preview", "succeeded", None), job
    found = job["metrics"]["conflicts"]
    assert found["versions"] == [named[name] for name in ("ONE", "TWO", "BASE")]
    assert found["cosine"][0][2] is None  # the base changes nothing
    assert [row["layer"] for row in found["layers"]] == [1]
    assert found["edits"] == {"count": 0, "listed": []}
