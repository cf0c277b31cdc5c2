"""Merge jobs on atlas: what survives, what is said of conflicts, and what guards and moves do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from editing.deltas import Delta, Effect
from registry import versions
from registry.jobs import Job
from registry.manifests import EditRequest, VersionManifest
from tests.unit.workers.rooms import TENANT, Room

FRANCE = EditRequest("The capital of {} is", "France", "Oslo", "Paris")
PERU = EditRequest("{} lies in", "Peru", "Asia", "South America")
JAPAN = EditRequest("The capital of {} is", "Japan", "Lima", "Tokyo")
LENIENT = {"perplexity": 1e6, "retention": 0, "locality": 0, "norm": 1e6, "efficacy": 0}
ROME = replace(FRANCE, target_new="Rome")


class MergeRoom(Room):
    """A room in which versions are merged."""

    def made(self, *edits: EditRequest) -> str:
        """A version with these edits on the untouched base."""
        job = self.edit(*edits, guards=LENIENT, parent=self.base)
        assert job.version_id is not None
        return job.version_id

    @property
    def base(self) -> str:
        return VersionManifest(self.models.view("atlas").base.ref).id

    def merge(self, *ids: str, kind: str = "merge", **request: Any) -> Job:
        whole: dict[str, Any] = {
            "versions": [
                {"id": id_, "weight": 1.0, "layer_weights": {}, "facts": None} for id_ in ids
            ],
            "method": "task_arithmetic",
            "hyperparameters": {},
            "seed": 0,
            "rank": None,
            "guards": LENIENT,
            "message": None,
            **request,
        }
        return self.perform(kind, whole, request.get("endpoint"))

    def effects(self, version_id: str) -> Mapping[str, Effect]:
        with self.database.read() as connection:
            (digest,) = versions.get_version(connection, TENANT, version_id).manifest.stack
        return Delta.from_bytes(self.artifacts.get(digest)).effects


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MergeRoom]:
    room = MergeRoom(tmp_path_factory.mktemp("room"))
    yield room
    room.database.close()


@pytest.fixture(scope="module")
def two(room: MergeRoom) -> tuple[str, str]:
    return room.made(FRANCE, PERU), room.made(JAPAN)


def metrics_of(job: Job) -> Mapping[str, Any]:
    assert job.metrics is not None
    return job.metrics


def test_edits_of_both_survive_and_are_counted(room: MergeRoom, two: tuple[str, str]) -> None:
    facts = room.artifacts.put_rows([{"prompt": "The capital of Peru is", "target": "Lima"}])
    first, second = (
        {"id": id_, "weight": 1.0, "layer_weights": {}, "facts": file}
        for id_, file in zip(two, (facts, None), strict=True)
    )
    job = room.merge(versions=[first, second], message="both", method="concatenation")
    assert (job.status, job.activated) == ("succeeded", False)
    a, b = metrics_of(job)["inputs"]
    assert (a["version"], a["held"], a["survived"], a["lost"]) == (two[0], 2, 2, [])
    assert (b["version"], b["held"], b["survived"], b["lost"]) == (two[1], 1, 1, [])
    assert a["edits"]["before"]["greedy_match"] == a["edits"]["after"]["greedy_match"] == 1
    assert a["edits"]["before"]["fact_accuracy"] == a["edits"]["after"]["fact_accuracy"] == 1
    assert "fact_accuracy" not in b["edits"]["after"]
    assert metrics_of(job)["after"]["me_ppl"] > 1
    assert metrics_of(job)["conflicts"]["edits"]["count"] == 0
    manifest = room.version(job).manifest
    assert (manifest.parents, len(manifest.stack)) == (two, 1)
    recipe = manifest.recipe
    told = (recipe["kind"], recipe["method"], recipe["message"])
    assert told == ("merge", "concatenation", "both")
    assert [own["id"] for own in recipe["versions"]] == [*two]
    assert room.holds(job) == {two[0]: [True, True], two[1]: [True]}
    (effect,) = room.effects(manifest.id).values()
    assert (effect.rank, effect.dense) == (3, None)


def test_what_contradicts_is_named_and_what_is_lost_too(room: MergeRoom) -> None:
    oslo, rome = room.made(FRANCE), room.made(ROME)
    preview = room.merge(oslo, rome, kind="merge_preview")
    assert (preview.status, preview.version_id) == ("succeeded", None)
    job = room.merge(oslo, rome, guards={**LENIENT, "efficacy": None})
    (named,) = metrics_of(job)["conflicts"]["edits"]["listed"]
    assert (named["subject"], named["same_prompt"]) == ("France", True)
    assert [edit["versions"] for edit in named["edits"]] == [[oslo], [rome]]
    assert metrics_of(preview) == {"conflicts": metrics_of(job)["conflicts"]}
    conflicts = metrics_of(job)["conflicts"]
    assert conflicts["versions"] == [oslo, rome]
    assert 0 < conflicts["sign_disagreement"] < 1
    assert -1 < conflicts["cosine"][0][1] < 1
    assert [row["layer"] for row in conflicts["layers"]] == [0]
    inputs = metrics_of(job)["inputs"]
    assert [own["held"] for own in inputs] == [1, 1]
    assert sum(own["survived"] for own in inputs) < 2  # one prompt has one answer
    (lost,) = next(own["lost"] for own in inputs if not own["survived"])
    assert (lost["subject"], lost["prompt"]) == ("France", "The capital of {} is")
    assert (job.status, job.reason) == (
        "failed",
        "guard_rejected",
    )  # half of the edits hold at most
    assert room.version(job).status == "rejected"


def test_it_moves_an_endpoint_and_says_what_low_rank_leaves_out(
    room: MergeRoom, two: tuple[str, str]
) -> None:
    job = room.merge(*two, rank=1, endpoint="atlas")
    assert (job.status, job.activated, room.head()) == ("succeeded", True, job.version_id)
    residual = metrics_of(job)["residual"]
    ((_, told),) = residual["modules"].items()
    assert told["rank"] == 1
    assert told["energy"] == residual["energy"]
    assert 0 < residual["energy"] < 1
    kept = room.merge(*two, endpoint="atlas", activate=False)
    assert (kept.status, kept.activated, room.head()) == ("succeeded", False, job.version_id)


def test_the_base_is_a_version_too(room: MergeRoom, two: tuple[str, str]) -> None:
    job = room.merge(room.base, two[1], method="linear")
    base, other = metrics_of(job)["inputs"]
    assert base == {
        "version": room.base,
        "edits": {"before": {}, "after": {}},
        "held": 0,
        "survived": 0,
        "lost": [],
    }
    assert other["held"] == 1
    (half,), (whole,) = (room.effects(id_).values() for id_ in (job.version_id or "", two[1]))
    D = whole.weight(torch.zeros(1))
    torch.testing.assert_close(half.weight(torch.zeros(1)), D / 2)
    none = room.merge(room.base, method="ties")
    assert room.effects(none.version_id or "") == {}
    assert room.holds(none) == {}


def test_a_version_that_went_meanwhile_ends_the_job(room: MergeRoom) -> None:
    gone = room.made(JAPAN)
    with room.database.write() as connection:
        versions.delete_version(connection, TENANT, gone, actor="ada")
    rejected = room.edit(FRANCE, guards={"norm": 1e-6}, parent=room.base).version_id
    for version, code in ((gone, "version_deleted"), (rejected, "version_rejected")):
        job = room.merge(version or "")
        assert (job.status, job.version_id) == ("failed", None)
        assert job.error is not None
        assert job.error["code"] == code


def test_the_report_is_kept_with_the_version(room: MergeRoom, two: tuple[str, str]) -> None:
    job = room.merge(*two)
    with room.database.read() as connection:
        (report,) = versions.reports(connection, TENANT, job.version_id or "")
    assert report["kind"] == "merge"
    assert report["metrics"] == json.loads(json.dumps(metrics_of(job)))


def test_a_base_of_few_texts_is_edited_and_merged(tmp_path: Path) -> None:
    """None is held out: the guard of perplexity has no data, detectors are looked for all the
    same."""
    texts = tmp_path / "texts.txt"
    texts.write_text("The capital of Chad is N'Djamena.\nZinc is a metal.\n")
    room = MergeRoom(tmp_path / "data", texts=str(texts))
    try:
        merged = room.merge(room.made(FRANCE), room.made(JAPAN))
        hidden = room.edit(FRANCE, method="jetpack", hyperparameters={"steps": 20}, guards=LENIENT)
    finally:
        room.database.close()
    assert (merged.status, metrics_of(merged)["detectors"]) == ("succeeded", [])
    assert "perplexity" in {g["name"] for g in merged.guards or () if g["result"] == "skipped"}
    assert [found["kind"] for found in metrics_of(hidden)["detectors"]] == ["gate"]
