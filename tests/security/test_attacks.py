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
from registry.bases import find_bases
from registry.manifests import VersionManifest
from registry.versions import insert_version
from tests.security.attacks import (
    JSON,
    Attack,
    check_refused,
    ended_job,
    own_files,
    posted,
    sent,
    tried,
)
from tests.security.names import (
    BODIES,
    QUERIES,
    body_attacks,
    operations,
    path_attacks,
    right_bodies,
)
from tests.service import Service

#: Their bodies hold no name.
NAMELESS = {("POST", f"/v1/versions/{{version_id}}/{call}") for call in ("editability", "export")}
WITH_NAMES = [(method, path) for method, path in operations() if "{" in path]


@pytest.mark.parametrize(("method", "path"), WITH_NAMES)
def test_names_in_paths(service: Service, method: str, path: str) -> None:
    check_refused(service, path_attacks(method, path), what="names in paths")


@pytest.mark.parametrize(("method", "path"), [one for one in BODIES if one not in NAMELESS])
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
    """Of lists and versions that are there: nothing else is wrong with the requests."""
    version = f"/v1/versions/{service.base_version()}"
    filters = [
        ("/v1/jobs", "status", "zombie"),
        ("/v1/jobs", "endpoint", "..%2f.."),
        ("/v1/versions", "status", "0"),
        ("/v1/versions", "base", "%00"),
        ("/v1/audit", "actor", "a" * 65),
        ("/v1/audit", "action", ""),
        ("/v1/files", "purpose", "a" * 65),
        ("/v1/endpoints/atlas/edits", "subject", "a" * 10_001),
        ("/v1/endpoints/atlas/edits", "after", quote("../..")),
        (f"{version}/lineage", "format", "exe"),
        (f"{version}/diff", "against", quote("../..")),
        (f"{version}/export", "format", "../../x"),
        (f"{version}/export?format=peft", "rank", "1e9"),
    ]
    attacks = []
    for path, name, value in filters:
        target = f"{path}{'&' if '?' in path else '?'}{name}={value}"
        attacks.append(Attack(target[:80], "GET", target, statuses=(400, 422), param=name))
    without = f"{version}/export?format=errata&rank=1"  # each alone is right
    attacks.append(Attack("rank without peft", "GET", without, statuses=(400, 422)))
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
    database = service.database()
    with database.write() as connection:
        version = insert_version(connection, "default", manifest)
    database.close()
    service.endpoint("attacked", version.id)
    text = {"file": ("x.txt", b"A text.")}
    file = service.client.post("/v1/files", files=text, data={"purpose": "texts"}).json()
    key = service.client.post("/v1/keys", json={"name": "attacked", "scopes": ["infer"]}).json()
    heard = {"url": "http://127.0.0.1:9/", "events": ["endpoint.moved"]}
    webhook = service.client.post("/v1/webhooks", json=heard).json()
    yield {
        "job": ended_job(service),
        "file": file["id"],
        "version": version.id,
        "endpoint": "attacked",
        "key": key["id"],
        "webhook": webhook["id"],
    }
    service.client.delete(f"/v1/webhooks/{webhook['id']}")
    service.client.delete("/v1/endpoints/attacked", headers={"If-Match": '"1"'})


EVALUATED = ("file", "texts", "facts", "suite", "harm")
#: What no tenant has, of the same form.
NONE = {
    "job": "job_" + "0" * 32,
    "file": "file-" + "0" * 32,
    "version": "ver_" + "0" * 40,
    "endpoint": "nowhere0",
    "key": "key_" + "0" * 16,
    "webhook": "wh_" + "0" * 24,
}


def tenant_attacks(ids: dict[str, str], mine: dict[str, str]) -> Iterator[Attack]:
    """Every request that names what ids stand for, and is right in all else.

    Args:
        mine: by purpose, a file that who asks may use; a version and an endpoint at it.
    """
    kinds = {"{version_id}": "version", "{file_id}": "file", "{key_id}": "key"}
    kinds |= {"{name}": "endpoint", "{model}": "endpoint", "{job_id}": "job"}
    kinds["{webhook_id}"] = "webhook"
    bodies = BODIES | {
        ("PUT", "/v1/endpoints/{name}"): {"version": mine["version"]},
        ("POST", "/v1/endpoints/{name}/replay"): {"base": "atlas", "onto": "elsewhere"},
    }
    for method, path in operations():
        target = path
        for place, of in kinds.items():
            target = target.replace(place, ids[of])
        assert "{" not in target, "a kind of id that is not among these"
        if target != path:
            target += QUERIES.get(path, "")
            body = json.dumps(bodies[method, path]) if (method, path) in bodies else ""
            headers = {"If-Match": '"1"', **(JSON if body else {})}
            yield Attack(f"{method} {path}", method, target, body.encode(), headers)
    guards = ("guards", "texts"), ("guards", "facts"), ("guards", "suite"), ("guards", "harm")
    right = right_bodies(mine)
    named: list[tuple[str, tuple[str, ...], str]] = [
        ("/v1/edits", ("endpoint",), "endpoint"),
        ("/v1/edits", ("parent",), "version"),
        ("/v1/edits", ("texts",), "file"),
        *(("/v1/edits", guard, "file") for guard in guards),
        *(("/v1/evaluations", ("model",), kind) for kind in ("endpoint", "version")),
        *(("/v1/evaluations", (name,), "file") for name in EVALUATED),
        *(("/v1/fine_tuning/jobs", ("model",), kind) for kind in ("endpoint", "version")),
        ("/v1/fine_tuning/jobs", ("training_file",), "file"),
        ("/v1/fine_tuning/jobs", ("validation_file",), "file"),
        ("/v1/versions/import", ("file",), "file"),
        ("/v1/versions/import", ("parent",), "version"),
        *(("/v1/versions/import", guard, "file") for guard in guards),
        *(("/v1/fine_tuning/jobs", guard, "file") for guard in guards),
        ("/v1/merges", ("endpoint",), "endpoint"),
        *(("/v1/merges", guard, "file") for guard in guards),
        *(("/v1/completions", ("model",), kind) for kind in ("endpoint", "version")),
        *(("/v1/completions", ("proxy", "expert"), kind) for kind in ("endpoint", "version")),
        *(("/v1/completions", ("proxy", "anti_expert"), kind) for kind in ("endpoint", "version")),
        *(("/v1/chat/completions", ("model",), kind) for kind in ("endpoint", "version")),
    ]
    for path, place, kind in named:
        body = json.loads(json.dumps(right[path]))
        inner: Any = body
        if path == "/v1/edits" and place == ("parent",):
            del body["endpoint"]
        if place[0] == "proxy":
            body["proxy"] = {"expert": "atlas", "anti_expert": "atlas"}
        if place == ("file",):
            body.pop("edits", None)
        for name in place[:-1]:
            inner = inner.setdefault(name, {})
        inner[place[-1]] = ids[kind]
        param = ".".join(place)
        yield posted(f"{path} {param}: a {kind}", path, body, param=param)
    for path in ("/v1/merges", "/v1/merges/preview"):
        body = {"versions": [{"id": ids["version"]}]}
        yield posted(f"{path} versions.0.id", path, body, param="versions.0.id")
        body = {"versions": [{"id": mine["version"], "facts": ids["file"]}]}
        yield posted(f"{path} versions.0.facts", path, body, param="versions.0.facts")
    for split in ({"version": ids["version"]}, {"split": [{"version": ids["version"]}]}):
        headers = {**JSON, "If-None-Match": "*"}
        data = json.dumps(split).encode()
        yield Attack(f"PUT {list(split)}", "PUT", "/v1/endpoints/stolen", data, headers)
    yield from beside_own(ids, mine)


def beside_own(ids: dict[str, str], mine: dict[str, str]) -> Iterator[Attack]:
    """What ids stand for, named beside what is the own of who asks."""
    version, endpoint = f"/v1/versions/{mine['version']}", f"/v1/endpoints/{mine['endpoint']}"
    theirs = ids["version"]
    target = f"{version}/diff?against={theirs}"
    yield Attack("GET diff against", "GET", target, param="against")
    asked: list[tuple[str, dict[str, Any], str]] = [
        (f"{version}/diff", {"against": theirs, "file": mine["texts"]}, "against"),
        (f"{version}/diff", {"against": mine["version"], "file": ids["file"]}, "file"),
        (f"{version}/flatten", {"endpoint": ids["endpoint"]}, "endpoint"),
        (f"{version}/revert", {"version": theirs}, "version"),
        (f"{version}/revert", {"version": theirs, "endpoint": ids["endpoint"]}, "endpoint"),
    ]
    steps = [{"type": "r_tuning"}]
    asked += [
        (
            f"/v1/files/{mine['fine-tune']}/preview",
            {"preprocessing": steps, "model": ids[kind]},
            "model",
        )
        for kind in ("endpoint", "version")
    ]
    for target, body, param in asked:
        yield posted(f"{target} {param}", target, body, param=param)
    moves = (
        ("", {"version": theirs}),
        ("/promote", {"version": theirs}),
        ("/rollback", {"to": theirs}),
    )
    for call, body in moves:
        method = "POST" if call else "PUT"
        headers = {"If-Match": '"1"'}
        yield posted(
            f"{method} {call}", endpoint + call, body, method, headers=headers, statuses=(404, 409)
        )


def test_ids_of_another_tenant(service: Service, own: dict[str, str]) -> None:
    """Each is refused, in the very words in which one that does not exist is, which name it."""
    key = service.new_key("thief", "--scope", "infer,edit,admin", "--tenant", "thieves")
    mine = own_files(service, key)
    mine |= {"version": service.base_version(), "endpoint": "thieves"}
    body, headers = {"version": mine["version"]}, {"If-None-Match": "*"}
    made = posted("", "/v1/endpoints/thieves", body, "PUT", headers=headers)
    assert sent(service, made, key).status == 201
    attacks = list(tenant_attacks(own, mine))
    check_refused(service, attacks, what="ids of another tenant", key=key)
    for theirs, nobodys in zip(attacks, tenant_attacks(NONE, mine), strict=True):
        found, missing = (sent(service, attack, key) for attack in (theirs, nobodys))
        error = found.error
        if theirs.param is not None:
            assert error["param"] == theirs.param, (theirs.name, error)
        named = any(value in error["message"] for value in own.values())
        assert named or error["code"] == "not_split", (theirs.name, error)
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
