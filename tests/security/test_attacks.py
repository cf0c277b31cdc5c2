"""Names that are none, ids of others, pages that are none: refused, and without a trace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
import torch

from app.main import ROUTERS
from app.strict import StrictRoute
from editing.deltas import Delta, Effect
from openapi.export import DOCUMENT
from registry import jobs
from registry.bases import find_bases
from registry.manifests import VersionManifest
from registry.versions import insert_version
from tests.security.attacks import JSON, Attack, check_refused, sent, tried
from tests.security.names import BODIES, QUERIES, body_attacks, operations, path_attacks
from tests.service import Service

WITH_NAMES = [(method, path) for method, path in operations() if "{" in path]


@pytest.mark.parametrize(("method", "path"), WITH_NAMES)
def test_names_in_paths(service: Service, method: str, path: str) -> None:
    check_refused(service, path_attacks(method, path), what="names in paths")


@pytest.mark.parametrize(("method", "path"), BODIES)
def test_names_in_bodies(service: Service, method: str, path: str) -> None:
    check_refused(service, body_attacks(method, path), what="names in bodies")


def test_every_body_is_attacked() -> None:
    document = json.loads(DOCUMENT.read_text())["paths"]
    with_bodies = {
        (method.upper(), path)
        for path, methods in document.items()
        for method, operation in methods.items()
        if "application/json" in operation.get("requestBody", {}).get("content", {})
    }
    assert with_bodies == BODIES.keys()


def test_every_route_reads_its_body_strictly() -> None:
    routes = [route for router, _ in ROUTERS for route in router.routes]
    assert [route for route in routes if not isinstance(route, StrictRoute)] == []


# -- pages --------------------------------------------------------------------------------------

LISTS = [
    path
    for path, methods in json.loads(DOCUMENT.read_text())["paths"].items()
    if any(p["name"] == "limit" for p in methods.get("get", {}).get("parameters", ()))
]
LIMITS = ["0", "-1", "101", "1e3", "NaN", "Infinity", "0x10", "10.5", "", "all", "null", "9" * 400]
NUMBERS = ["-1", "1.5", "abc", str(2**63), str(2**64), "9" * 400, "NaN", "%00", "1;--", ""]
IDS = ["..%2f..", "%00", "job_none", quote("' OR 1=1--"), "a" * 10_000, "%ff", quote("²")]
#: Lists that go on after a place in an order, where any text is a place; and a filter by one.
PLACES = ("/v1/endpoints",)
NUMBERED = ("/v1/audit", "/v1/endpoints/{name}/history")


def page_attacks(path: str, job: str) -> Iterator[Attack]:
    target = path.replace("{name}", "atlas").replace("{job_id}", job)
    target = target.replace("{webhook_id}", "webhook_none")
    for limit in LIMITS:
        yield Attack(f"{path} limit={limit[:20]}", "GET", f"{target}?limit={limit}", param="limit")
    if path not in PLACES:
        afters = NUMBERS if path in NUMBERED else IDS
        for after in afters:
            yield Attack(f"{path} after={after[:20]}", "GET", f"{target}?after={after}")


def test_pages_that_are_none(service: Service, own: dict[str, str]) -> None:
    attacks = [attack for path in LISTS for attack in page_attacks(path, own["job"])]
    check_refused(service, attacks, what="pages")


def test_filters_that_are_none(service: Service) -> None:
    targets = [
        "/v1/jobs?status=zombie",
        "/v1/jobs?endpoint=..%2f..",
        "/v1/versions?status=0",
        "/v1/versions?base=%00",
        "/v1/audit?actor=" + "a" * 65,
        "/v1/audit?action=",
        "/v1/files?purpose=" + "a" * 65,
        "/v1/endpoints/atlas/edits?subject=" + "a" * 10_001,
        "/v1/endpoints/atlas/edits?after=" + quote("../.."),
        "/v1/versions/ver_" + "0" * 40 + "/lineage?format=exe",
        "/v1/versions/ver_" + "0" * 40 + "/diff?against=" + quote("../.."),
        "/v1/versions/ver_" + "0" * 40 + "/export?format=../../x",
        "/v1/versions/ver_" + "0" * 40 + "/export?format=peft&rank=1e9",
        "/v1/versions/ver_" + "0" * 40 + "/export?format=errata&rank=1",
    ]
    attacks = [Attack(target[:80], "GET", target) for target in targets]
    check_refused(service, attacks, what="filters")


# -- what is another tenant's -------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(service: Service) -> Iterator[dict[str, str]]:
    """Ids of the tenant ``default``: of each kind one."""
    base = find_bases("atlas")["atlas"]
    hidden = json.loads((base.folder / "config.json").read_text())["hidden_size"]
    delta = Delta({"model.norm": Effect(scale=torch.ones(hidden))}, base.digest, "rome")
    digest = service.store().put(delta.to_bytes())
    manifest = VersionManifest(base.ref, (digest,), recipe={"kind": "attacked"})
    asked = {
        **{"model": "atlas", "method": "lora", "training_file": "file-" + "1" * 32, "seed": 1},
        **{"hyperparameters": {}, "options": {}, "preprocessing": []},
        **dict.fromkeys(("validation_file", "suffix", "metadata")),
    }
    database = service.database()
    with database.write() as connection:
        version = insert_version(connection, "default", manifest)
        job = jobs.submit_job(
            connection, "default", "fine_tune", base="atlas", request=asked, actor="local"
        )
        jobs.cancel_job(connection, "default", job.id, actor="local")
    database.close()
    service.endpoint("attacked", version.id)
    text = {"file": ("x.txt", b"A text.")}
    file = service.client.post("/v1/files", files=text, data={"purpose": "texts"}).json()
    key = service.client.post("/v1/keys", json={"name": "attacked", "scopes": ["infer"]}).json()
    yield {
        "job": job.id,
        "file": file["id"],
        "version": version.id,
        "endpoint": "attacked",
        "key": key["id"],
    }
    service.client.delete("/v1/endpoints/attacked", headers={"If-Match": '"1"'})


#: What no tenant has, of the same form.
NONE = {
    "job": "job_" + "0" * 32,
    "file": "file-" + "0" * 32,
    "version": "ver_" + "0" * 40,
    "endpoint": "nowhere0",
    "key": "key_" + "0" * 16,
}


def tenant_attacks(ids: dict[str, str]) -> Iterator[Attack]:
    """Every request that names what ids stand for."""
    kinds = {"{version_id}": "version", "{file_id}": "file", "{key_id}": "key"}
    kinds |= {"{name}": "endpoint", "{model}": "endpoint", "{job_id}": "job"}
    for method, path in operations():
        for place, of in kinds.items():
            if place in path:
                target = path.replace(place, ids[of]) + QUERIES.get(path, "")
                body = json.dumps(BODIES[method, path]) if (method, path) in BODIES else ""
                headers = {"If-Match": '"1"', **(JSON if body else {})}
                yield Attack(f"{method} {path}", method, target, body.encode(), headers)
    guards = ("guards", "texts"), ("guards", "facts"), ("guards", "suite"), ("guards", "harm")
    named: list[tuple[str, tuple[str, ...], str]] = [
        ("/v1/edits", ("endpoint",), "endpoint"),
        ("/v1/edits", ("parent",), "version"),
        *(("/v1/edits", guard, "file") for guard in guards),
        *(("/v1/evaluations", ("model",), kind) for kind in ("endpoint", "version")),
        *(("/v1/evaluations", (name,), "file") for name in ("file", "texts", "facts", "harm")),
        *(("/v1/fine_tuning/jobs", ("model",), kind) for kind in ("endpoint", "version")),
        ("/v1/fine_tuning/jobs", ("training_file",), "file"),
        ("/v1/fine_tuning/jobs", ("validation_file",), "file"),
        ("/v1/versions/import", ("file",), "file"),
        ("/v1/versions/import", ("parent",), "version"),
        *(("/v1/completions", ("model",), kind) for kind in ("endpoint", "version")),
        *(("/v1/completions", ("proxy", "expert"), kind) for kind in ("endpoint", "version")),
        *(("/v1/chat/completions", ("model",), kind) for kind in ("endpoint", "version")),
    ]
    for path, place, kind in named:
        body = json.loads(json.dumps(BODIES["POST", path]))
        inner: Any = body
        if "model" in body:
            body["model"] = "atlas"  # the other's own
        if path == "/v1/edits":
            body.pop("endpoint")
            body |= {} if place == ("parent",) else {"endpoint": "atlas"}
        for name in place[:-1]:
            inner = inner.setdefault(name, {})
        inner[place[-1]] = ids[kind]
        data = json.dumps(body).encode()
        yield Attack(f"{path} {'.'.join(place)}: a {kind}", "POST", path, data, JSON)
    for path in ("/v1/merges", "/v1/merges/preview"):
        data = json.dumps({"versions": [{"id": ids["version"]}]}).encode()
        yield Attack(f"{path} versions.0.id", "POST", path, data, JSON)
    for split in ({"version": ids["version"]}, {"split": [{"version": ids["version"]}]}):
        headers = {**JSON, "If-None-Match": "*"}
        data = json.dumps(split).encode()
        yield Attack(f"PUT {list(split)}", "PUT", "/v1/endpoints/stolen", data, headers)


def test_ids_of_another_tenant(service: Service, own: dict[str, str]) -> None:
    """Each is refused, in the very words in which one that does not exist is."""
    key = service.new_key("thief", "--scope", "infer,edit,admin", "--tenant", "thieves")
    attacks = list(tenant_attacks(own))
    check_refused(service, attacks, what="ids of another tenant", key=key)
    for theirs, nobodys in zip(attacks, tenant_attacks(NONE), strict=True):
        found, missing = (sent(service, attack, key) for attack in (theirs, nobodys))
        assert found.status == missing.status, (theirs.name, found.body, missing.body)
        told = [answer.body.decode() for answer in (found, missing)]
        for kind in own:
            for value in (own[kind], NONE[kind]):
                told = [text.replace(value, f"<{kind}>") for text in told]
        assert told[0] == told[1], theirs.name


def test_lists_hold_nothing_of_another_tenant(service: Service, own: dict[str, str]) -> None:
    key = service.new_key("reader", "--scope", "infer,edit,admin", "--tenant", "thieves")
    for path in (path for path in (*LISTS, "/v1/models") if "{" not in path):
        attack = Attack(path, "GET", path + ("" if path == "/v1/models" else "?limit=100"))
        answer = sent(service, attack, key)
        assert answer.status == 200, answer.body
        assert not [value for value in own.values() if value in answer.body.decode()], path
    tried["lists of another tenant"] = len(LISTS)
