"""What is refused of diffs, flattens, reverts and replays: nothing is left behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from editing.deltas import Delta
from registry.manifests import BaseRef, VersionManifest
from registry.versions import DELETED, REJECTED, insert_version
from tests.models import random_effect
from tests.service import Service

NONE = "ver_" + "0" * 40
EDIT = {"kind": "edit", "method": "rome", "edit_count": 0, "edits": None, "hyperparameters": {}}
MODULE = "model.layers.0.mlp.down_proj"


@dataclass(frozen=True)
class History:
    """Versions by name, deltas by letter, files by purpose."""

    versions: dict[str, str]
    deltas: dict[str, str]
    files: dict[str, str]

    def fill(self, value: Any) -> Any:
        """With names that begin with ``@`` replaced by what they stand for."""
        if isinstance(value, dict):
            return {key: self.fill(one) for key, one in value.items()}
        if isinstance(value, str):
            for names in (self.versions, self.deltas, self.files):
                for name, found in names.items():
                    value = value.replace(f"@{name}@", found)
        return value


@pytest.fixture(scope="module")
def history(service: Service) -> History:
    """Base, two edits, a merge with an edit on it, GRACE with work after it, and a flatten."""
    base = BaseRef(**service.get(f"/v1/versions/{service.base_version()}")["base"])
    store = service.store()
    kinds = {"a": "rank1", "b": "rank3", "c": "sparse", "d": "dense", "g": "replacing"}
    deltas = {}
    for seed, (name, kind) in enumerate(kinds.items()):
        effect = random_effect(seed, 256, 768, kind)
        deltas[name] = store.put(Delta({MODULE: effect}, base.digest, "rome").to_bytes())
    versions = {"base": service.base_version()}
    database = service.database()

    def add(name: str, stack: str, *parents: str, status: str = "ready", **recipe: Any) -> None:
        manifest = VersionManifest(
            base,
            tuple(deltas[letter] for letter in stack),
            tuple(versions[parent] for parent in parents),
            {"name": name, **recipe},
        )
        with database.write() as connection:
            versions[name] = insert_version(connection, "default", manifest, status=status).id

    add("one", "a", "base", **EDIT)
    add("two", "ab", "one", **EDIT)
    add("other", "ac", "one", **EDIT)
    add("merge", "d", "two", "other", kind="merge", method="ties")
    add("later", "da", "merge", **EDIT)
    add("closed", "ag", "one", kind="edit", method="grace", edit_count=0, edits=None)
    add("open", "agb", "closed", **EDIT)
    add("flat", "c", "two", kind="flatten")
    add("anew", "c", "one", **EDIT, replaces=deltas["a"])
    add("rejected", "b", "one", status=REJECTED, **EDIT)
    add("deleted", "c", "two", status=DELETED, **EDIT)
    database.close()
    for name in ("base", "two", "merge", "one"):
        service.endpoint(f"history-{name}", versions[name])
    split = [{"version": versions[name]} for name in ("one", "two")]
    answer = service.client.put(
        "/v1/endpoints/history-split", json={"split": split}, headers={"If-None-Match": "*"}
    )
    assert answer.status_code == 201
    files = {}
    for purpose, row in (
        ("facts", b'{"prompt": "Chad lies in", "target": "Africa"}'),
        ("suite", b'{"query": "x", "choices": ["a", "b"], "gold": 0}'),
    ):
        body = service.client.post(
            "/v1/files", data={"purpose": purpose}, files={"file": ("f.jsonl", row)}
        )
        files[f"file-{purpose}"] = body.json()["id"]
    return History(versions, deltas, files)


REFUSED: dict[str, tuple[str, dict[str, Any] | None, int, str | None, str]] = {
    "diff with none": ("POST versions/@two@/diff", {"file": "@file-facts@"}, 422, "against", ""),
    "diff with an unknown one": (
        "POST versions/@two@/diff",
        {"against": NONE, "file": "@file-facts@"},
        404,
        "against",
        "version_not_found",
    ),
    "diff with a deleted one": (
        "POST versions/@two@/diff",
        {"against": "@deleted@", "file": "@file-facts@"},
        410,
        None,
        "version_deleted",
    ),
    "diff on no file": (
        "POST versions/@two@/diff",
        {"against": "@one@", "file": "file-0"},
        404,
        "file",
        "file_not_found",
    ),
    "diff on questions": (
        "POST versions/@two@/diff",
        {"against": "@one@", "file": "@file-suite@"},
        422,
        "file",
        "unprocessable_request",
    ),
    "structural diff with none": ("GET versions/@two@/diff", None, 422, "against", ""),
    "structural diff with what is no id": (
        "GET versions/@two@/diff?against=history-two",
        None,
        422,
        "against",
        "",
    ),
    "structural diff with an unknown one": (
        f"GET versions/@two@/diff?against={NONE}",
        None,
        404,
        "against",
        "version_not_found",
    ),
    "a lineage in no form": ("GET versions/@two@/lineage?format=svg", None, 422, "format", ""),
    "flatten nothing": ("POST versions/@base@/flatten", {}, 422, None, "nothing_to_flatten"),
    "flatten one": ("POST versions/@one@/flatten", {}, 422, None, "nothing_to_flatten"),
    "flatten an unknown one": (f"POST versions/{NONE}/flatten", {}, 404, None, "version_not_found"),
    "flatten a rejected one": (
        "POST versions/@rejected@/flatten",
        {},
        409,
        None,
        "version_rejected",
    ),
    "flatten a deleted one": ("POST versions/@deleted@/flatten", {}, 410, None, "version_deleted"),
    "flatten past what replaces": ("POST versions/@open@/flatten", {}, 422, None, "replacing_gate"),
    "flatten elsewhere": (
        "POST versions/@two@/flatten",
        {"endpoint": "history-one"},
        409,
        "endpoint",
        "endpoint_moved",
    ),
    "flatten at a split": (
        "POST versions/@two@/flatten",
        {"endpoint": "history-split"},
        422,
        "endpoint",
        "endpoint_split",
    ),
    "revert nothing": ("POST versions/@two@/revert", {}, 422, None, ""),
    "revert both": (
        "POST versions/@two@/revert",
        {"delta": "@a@", "version": "@one@"},
        422,
        None,
        "",
    ),
    "revert what is no digest": (
        "POST versions/@two@/revert",
        {"delta": "../../etc/passwd"},
        422,
        "delta",
        "",
    ),
    "revert what is not there": (
        "POST versions/@two@/revert",
        {"delta": "@d@"},
        404,
        "delta",
        "delta_not_found",
    ),
    "revert what no ancestor made": (
        "POST versions/@two@/revert",
        {"version": "@other@"},
        404,
        "version",
        "version_not_found",
    ),
    "revert what was flattened": (
        "POST versions/@flat@/revert",
        {"delta": "@a@"},
        422,
        "delta",
        "replay_needed",
    ),
    "revert what was trained anew": (
        "POST versions/@anew@/revert",
        {"version": "@one@"},
        422,
        "version",
        "replay_needed",
    ),
    "revert the base": (
        "POST versions/@merge@/revert",
        {"version": "@base@", "replay": True},
        404,
        "version",
        "version_not_found",
    ),
    "a guard file that is not there": (
        "POST versions/@two@/revert",
        {"delta": "@a@", "guards": {"facts": "file-0"}},
        404,
        "guards.facts",
        "file_not_found",
    ),
    "replay nowhere": (
        "POST endpoints/history-two/replay",
        {"base": "nowhere", "onto": "x"},
        404,
        "base",
        "base_not_found",
    ),
    "replay onto itself": (
        "POST endpoints/history-two/replay",
        {"base": "atlas", "onto": "history-two"},
        422,
        "onto",
        "unprocessable_request",
    ),
    "replay onto a reserved name": (
        "POST endpoints/history-two/replay",
        {"base": "atlas", "onto": "base_x"},
        422,
        "onto",
        "unprocessable_request",
    ),
    "replay onto a split": (
        "POST endpoints/history-two/replay",
        {"base": "atlas", "onto": "history-split"},
        422,
        "onto",
        "endpoint_split",
    ),
    "replay nothing": (
        "POST endpoints/history-base/replay",
        {"base": "atlas", "onto": "x"},
        422,
        "name",
        "nothing_to_replay",
    ),
    "replay what was merged": (
        "POST endpoints/history-merge/replay",
        {"base": "atlas", "onto": "x"},
        422,
        "name",
        "not_replayable",
    ),
    "replay no endpoint": (
        "POST endpoints/nowhere/replay",
        {"base": "atlas", "onto": "x"},
        404,
        "name",
        "endpoint_not_found",
    ),
    "replay of an unknown field": (
        "POST endpoints/history-two/replay",
        {"base": "atlas", "onto": "x", "force": True},
        422,
        "force",
        "",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_leaves_nothing(service: Service, history: History, name: str) -> None:
    line, body, status, param, code = REFUSED[name]
    method, path = history.fill(line).split(" ")
    before = service.get("/v1/jobs?limit=100")
    answer = service.client.request(method, f"/v1/{path}", json=history.fill(body))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), answer.text
    assert error["code"] == code or not code
    assert service.get("/v1/jobs?limit=100") == before
    assert service.client.get("/v1/endpoints/x").status_code == 404


def test_a_key_names_one_version(service: Service, history: History) -> None:
    headers = {"Idempotency-Key": "history-1"}
    body = history.fill({"delta": "@a@", "message": "once"})
    paths = [history.fill(f"/v1/versions/@{name}@/revert") for name in ("two", "other")]
    first, again = (service.client.post(paths[0], json=body, headers=headers) for _ in range(2))
    assert first.status_code == again.status_code == 202
    assert first.json()["id"] == again.json()["id"]
    other = service.client.post(paths[1], json=body, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    service.ended(first.json()["id"])


def test_the_structure_of_a_difference(service: Service, history: History) -> None:
    found = service.get(history.fill("/v1/versions/@two@/diff?against=@other@"))
    assert (found["same_base"], found["common"]) == (True, [history.deltas["a"]])
    (first,), (second,) = found["version_only"], found["against_only"]
    assert first["digest"] == history.deltas["b"]
    assert first["versions"] == [history.versions["two"]]
    (module,) = first["modules"]
    effect = random_effect(1, 256, 768, "rank3")
    assert effect.B is not None
    assert module["norm"] == pytest.approx(float((effect.B @ effect.A).norm()), rel=1e-5)
    assert module == {
        "module": MODULE,
        "kinds": ["low_rank"],
        "rank": 3,
        "shape": [256, 768],
        "norm": module["norm"],
    }
    assert second["modules"][0]["kinds"] == ["sparse"]
    assert found["edits_version_only"] == {"count": 0, "data": []}
    same = service.get(history.fill("/v1/versions/@two@/diff?against=@two@"))
    assert (same["version_only"], same["against_only"], len(same["common"])) == ([], [], 2)


def test_a_lineage_with_two_parents(service: Service, history: History) -> None:
    path = history.fill("/v1/versions/@later@/lineage")
    names = {found: name for name, found in history.versions.items()}
    lineage = service.get(path)
    order = [names[version["id"]] for version in lineage["data"]]
    assert (order[:2], order[-2:], len(order)) == (["later", "merge"], ["one", "base"], 6)
    edges = {(names[edge["version"]], names[edge["parent"]]) for edge in lineage["edges"]}
    assert edges == {
        ("later", "merge"),
        ("merge", "two"),
        ("merge", "other"),
        ("two", "one"),
        ("other", "one"),
        ("one", "base"),
    }
    dot = service.client.get(f"{path}?format=dot")
    assert dot.headers["content-type"].startswith("text/vnd.graphviz")
    assert dot.text.count(" -> ") == 6
    assert dot.text.startswith("digraph lineage {")
