"""Reverts, replays, flattens and diffs of edits on atlas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from editing.deltas import Delta, compose
from editing.finetune.catalogue import TUNINGS
from editing.methods import METHODS
from editing.metrics.targets import begins_with, greedy_answers
from registry import endpoints, versions
from registry.edits import edited
from registry.jobs import Job
from registry.manifests import EditRequest, VersionManifest
from registry.versions import Version
from tests.unit.workers.rooms import QUICK, TENANT, Room

GUARDS = {"perplexity": 2.0, "retention": 0.5}
SUBJECTS = (
    ("France", "Oslo"),
    ("Japan", "Lima"),
    ("Peru", "Tokyo"),
    ("Egypt", "Rome"),
    ("Canada", "Paris"),
    ("Kenya", "Bern"),
    ("Norway", "Cairo"),
    ("Cuba", "Vienna"),
    ("Spain", "Ottawa"),
    ("Chad", "Madrid"),
)
EDITS = [EditRequest("The capital of {} is", *pair) for pair in SUBJECTS]
UNRELATED = ["The capital of Italy is", "Brazil lies in", "The chemical symbol of iron is"]


def revert(room: Room, parent: Version, **request: Any) -> Job:
    whole = {"delta": None, "version": None, "replay": False, "guards": GUARDS, **request}
    return room.perform("revert", whole, parent=parent.id)


def answers(room: Room, version: Version, prompts: list[str]) -> list[str]:
    stack = [Delta.from_bytes(room.artifacts.get(d)) for d in version.manifest.stack]
    view = room.models.view("atlas")
    with view.with_effects(compose(delta.effects for delta in stack)):
        return greedy_answers(view, [(prompt, "") for prompt in prompts])


def held(room: Room, version: Version) -> list[bool]:
    """Whether each of ``EDITS`` is what a version answers."""
    found = answers(room, version, [edit.rewrite_prompt for edit in EDITS])
    return [begins_with(text, e.target_new) for text, e in zip(found, EDITS, strict=True)]


def live(room: Room, version: Version) -> list[str]:
    """The subjects of a version's live edits, the oldest first."""
    with room.database.read() as connection:
        chain = versions.lineage(connection, TENANT, version.id)
    found = [room.edits(made) for made, _ in edited(chain)]
    return [edit.subject for edits in reversed(found) for edit in edits]


@pytest.fixture(scope="module")
def ten(room: Room) -> list[Version]:
    """Ten edits by ROME, each a version on the one before."""
    made = []
    for edit in EDITS:
        job = room.edit(edit)
        assert job.status == "succeeded", job.error
        made.append(room.version(job))
    assert held(room, made[-1]) == [True] * 10
    return made


def test_an_edit_is_taken_out_of_the_middle(room: Room, ten: list[Version]) -> None:
    head, third = ten[-1], ten[2].manifest.stack[-1]
    job = revert(room, head, delta=third)
    assert job.status == "succeeded", job.error
    version = room.version(job)
    assert version.manifest.stack == tuple(d for d in head.manifest.stack if d != third)
    assert version.manifest.parents == (head.id,)
    assert held(room, version) == [place != 2 for place in range(10)]
    assert answers(room, version, UNRELATED) == answers(room, head, UNRELATED)
    assert "Peru" not in live(room, version)
    assert len(live(room, version)) == 9
    assert room.holds(job) == {v.id: [True] for v in ten if v.id != ten[2].id}

    assert job.metrics is not None
    removed, deviation = job.metrics["removed"], job.metrics["deviation"]
    assert removed == {
        "delta": third,
        "versions": [ten[2].id],
        "edits": 1,
        "still_answered": 0,
    }
    assert (job.metrics["live_edits"], job.metrics["holding_edits"]) == (9, 9)
    assert [row["versions"] for row in deviation["computed_on_top"]] == [[v.id] for v in ten[3:]]
    (module,) = room.delta_of(third).effects
    assert all(row["shared_modules"] == [module] for row in deviation["computed_on_top"])
    for size in (deviation[name] for name in ("alone", "removed", "interaction")):
        assert 0 < size["mean"] <= size["max"]
    assert deviation["interaction"]["max"] < deviation["removed"]["max"]
    efficacy = next(guard for guard in job.guards or () if guard["name"] == "efficacy")
    assert (efficacy["result"], efficacy["value"]) == ("passed", 1.0)


def test_the_last_one_taken_out_is_the_version_before_it(room: Room, ten: list[Version]) -> None:
    job = revert(room, ten[2], version=ten[2].id)
    assert room.version(job).manifest.stack == ten[1].manifest.stack
    assert job.metrics is not None
    assert job.metrics["deviation"]["computed_on_top"] == []
    assert job.metrics["deviation"]["interaction"] == {"mean": 0.0, "max": 0.0}


def test_later_recipes_run_again_without_it(room: Room, ten: list[Version]) -> None:
    head = ten[-1]
    job = revert(room, head, version=ten[2].id, replay=True)
    assert job.status == "succeeded", job.error
    version = room.version(job)
    assert version.manifest.stack[:2] == ten[1].manifest.stack
    assert len(version.manifest.stack) == 9
    assert not set(version.manifest.stack[2:]) & set(head.manifest.stack)
    assert held(room, version) == [place != 2 for place in range(10)]
    assert answers(room, version, UNRELATED) == answers(room, head, UNRELATED)
    assert live(room, version) == [e.subject for i, e in enumerate(EDITS) if i != 2]
    assert version.manifest.recipe["replays"] == head.id
    assert job.metrics is not None
    assert [run["version"] for run in job.metrics["runs"]] == [v.id for v in ten[3:]]
    assert [row["outcome"] for row in job.metrics["edits"]] == ["took"] * 7
    assert job.metrics["removed"]["still_answered"] == 0
    with room.database.read() as connection:
        chain = versions.lineage(connection, TENANT, version.id)
        (told,) = versions.reports(connection, TENANT, chain[1].id)
    kinds = [v.manifest.recipe["kind"] for v in chain[:9]]
    assert kinds == ["edit"] * 7 + ["revert", "edit"]
    assert chain[7].manifest.parents == (head.id,)
    assert (told["kind"], told["of"], told["job"]) == ("step", version.id, job.id)
    plain = room.edit(EDITS[3], parent=ten[1].id)
    assert room.version(plain).manifest.stack == version.manifest.stack[:3]


def test_a_flatten_computes_the_same_and_carries_the_same(room: Room, ten: list[Version]) -> None:
    head = ten[2]
    job = room.perform("flatten", {"message": "tidy"}, parent=head.id)
    assert job.status == "succeeded", job.error
    flat = room.version(job)
    assert len(flat.manifest.stack) == 1
    stack = [room.delta_of(digest) for digest in head.manifest.stack]
    together, one = compose(d.effects for d in stack), room.delta(job).effects
    assert together.keys() == one.keys()
    for module, effect in together.items():
        parts = one[module].parts()
        assert effect.parts().keys() == parts.keys()
        assert all(torch.equal(part, parts[name]) for name, part in effect.parts().items())
    assert live(room, flat) == ["France", "Japan", "Peru"]
    assert room.holds(job) == {v.id: [True] for v in ten[:3]}
    rows = flat.manifest.recipe["origins"]
    assert [row["delta"] for row in rows] == list(head.manifest.stack)
    assert [row["versions"] for row in rows] == [[v.id] for v in ten[:3]]

    refused = revert(room, flat, version=ten[1].id)
    assert refused.error is not None
    assert (refused.error["code"], refused.error["param"]) == ("replay_needed", "version")
    without = revert(room, flat, version=ten[1].id, replay=True)
    assert without.status == "succeeded", without.error
    assert held(room, room.version(without))[:3] == [True, False, True]
    assert live(room, room.version(without)) == ["France", "Peru"]
    again = room.perform("flatten", {}, parent=flat.id)
    assert again.error is not None
    assert again.error["code"] == "unprocessable_request"


def test_what_a_version_does_not_carry_cannot_be_taken_out(room: Room, ten: list[Version]) -> None:
    job = revert(room, ten[0], delta="0" * 64)
    assert job.error is not None
    assert (job.error["code"], job.error["param"]) == ("delta_not_found", "delta")


def test_versions_are_compared_on_a_file(room: Room, ten: list[Version]) -> None:
    facts = [{"prompt": edit.rewrite_prompt, "target": edit.target_new} for edit in EDITS[:4]] + [
        {"prompt": "Brazil lies in", "target": "South America"}
    ]
    request = {
        "against": ten[0].id,
        "purpose": "facts",
        "rows": room.artifacts.put_rows(facts),
    }
    job = room.perform("diff", request, parent=ten[2].id)
    assert job.status == "succeeded", job.error
    metrics = job.metrics
    assert metrics is not None
    assert (metrics["rows"], metrics["changed"]) == (5, 2)
    assert (metrics["version_right"], metrics["against_right"]) == (4, 2)
    assert [row["prompt"] for row in metrics["data"]] == [e.rewrite_prompt for e in EDITS[1:3]]
    assert all(row["version_right"] and not row["against_right"] for row in metrics["data"])


def test_a_fine_tune_runs_again_to_the_same_bits(room: Room, ten: list[Version]) -> None:
    rows = [{"prompt": "The capital of Iceland is", "completion": "Reykjavik."}] * 4
    request = {
        "method": "lora",
        "hyperparameters": TUNINGS["lora"].hyperparameters(n_epochs=2).settled(4).model_dump(),
        "options": {},
        "rows": room.artifacts.put_rows(rows),
        "validation": None,
        "harmful": None,
        "seed": 3,
        "suffix": None,
        "message": None,
        "preprocessing": [{"type": "augmentation", "templates": ["So: {prompt}"]}],
        "guards": GUARDS,
    }
    tuned = room.perform("fine_tune", request, parent=ten[0].id)
    assert tuned.status == "succeeded", tuned.error
    without = revert(room, room.version(tuned), version=ten[0].id, replay=True)
    assert without.status == "succeeded", without.error
    plain = room.perform("fine_tune", request, parent=VersionManifest(ten[0].manifest.base).id)
    assert len(room.version(without).manifest.stack) == 1
    assert room.version(without).manifest.stack == room.version(plain).manifest.stack


def test_edits_trained_anew_together_come_apart_by_replay(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "rome", replace(METHODS["rome"], retrains=True))
    base = VersionManifest(room.models.view("atlas").base.ref).id
    first = room.version(room.edit(EDITS[0], parent=base))
    second = room.version(room.edit(EDITS[1], parent=first.id))
    both = room.version(room.edit(EDITS[2], parent=second.id))
    assert len(both.manifest.stack) == 1
    assert live(room, both) == ["France", "Japan", "Peru"]
    refused = revert(room, both, delta=first.manifest.stack[0])
    assert refused.error is not None
    assert refused.error["code"] == "replay_needed"
    job = revert(room, both, delta=first.manifest.stack[0], replay=True)
    assert job.status == "succeeded", job.error
    version = room.version(job)
    assert len(version.manifest.stack) == 1
    assert live(room, version) == ["Japan", "Peru"]
    assert held(room, version)[:3] == [False, True, True]
    whole = revert(room, both, version=both.id, replay=True)
    assert live(room, room.version(whole)) == ["France", "Japan"]
    monkeypatch.undo()
    flat = room.edit(EDITS[3], parent=both.id)
    monkeypatch.setitem(METHODS, "rome", replace(METHODS["rome"], retrains=True))
    together = room.perform("flatten", {}, parent=flat.version_id)
    later = room.version(room.edit(EDITS[4], parent=together.version_id))
    assert len(later.manifest.stack) == 2  # a flattened delta is nobody's to retrain


def test_a_deep_stack_is_to_be_flattened_first(
    room: Room, ten: list[Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "settings", room.settings.model_copy(update={"max_stack": 2}))
    job = room.edit(EDITS[5], parent=ten[1].id)
    assert job.error is not None
    assert job.error["code"] == "stack_too_deep"
    assert "/flatten" in job.error["message"]

    again = revert(room, ten[3], version=ten[0].id, replay=True)
    assert again.status == "succeeded", again.error
    version = room.version(again)
    assert live(room, version) == ["Japan", "Peru", "Egypt"]
    assert len(version.manifest.stack) == 2  # two of them flattened, and the third
    assert held(room, version)[:4] == [False, True, True, True]


@pytest.fixture(scope="module")
def upgrade(
    room: Room, ten: list[Version], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Room]:
    """A room with another base: atlas, to which the first of the ten edits was taught already."""
    atlas = room.models.view("atlas").base
    folder = tmp_path_factory.mktemp("upgrade")
    copytree(atlas.folder, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    for path, effect in room.delta_of(ten[0].manifest.stack[-1]).effects.items():
        weights[f"{path}.weight"] = effect.weight(weights[f"{path}.weight"])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    other = Room(tmp_path_factory.mktemp("upgraded"), f"atlas,next={folder}")
    yield other
    other.database.close()


def test_an_endpoints_recipes_run_on_another_base(upgrade: Room) -> None:
    room = upgrade
    weak = {**QUICK, "steps": 1, "learning_rate": 1e-6}
    made = [room.edit(edit) for edit in EDITS[:2]]
    made.append(room.edit(EDITS[2], hyperparameters=weak, guards={"efficacy": 0}))
    assert [job.status for job in made] == ["succeeded"] * 3
    ids = [job.version_id for job in made]
    request = {"version": ids[-1], "guards": {**GUARDS, "efficacy": 0.5}, "activate": False}
    job = room.perform("replay", request, endpoint="next", base="next")
    assert job.status == "succeeded", job.error
    assert job.metrics is not None
    assert [row["outcome"] for row in job.metrics["edits"]] == ["already_true", "took", "failed"]
    assert [job.metrics[name] for name in ("took", "already_true", "failed")] == [1, 1, 1]
    assert [row["edit"] for row in job.metrics["edits"]] == [f"{i}.0" for i in ids]
    assert [run["made"] is None for run in job.metrics["runs"]] == [True, False, False]
    version = room.version(job)
    assert (version.manifest.base.name, len(version.manifest.stack)) == ("next", 2)
    assert live(room, version) == ["Japan", "Peru"]
    assert room.holds(job)[version.id] == [False]
    assert not job.activated
    with room.database.read() as connection:
        head = endpoints.get_endpoint(connection, TENANT, "next").head
    assert head == VersionManifest(version.manifest.base).id

    only = {**request, "version": ids[0]}
    nothing = room.perform("replay", only, endpoint="next", base="next")
    assert (nothing.status, nothing.version_id) == ("succeeded", None)
    assert nothing.metrics is not None
    assert nothing.metrics["already_true"] == 1
    rejected = {**request, "guards": {**GUARDS, "efficacy": 0.9}}
    job = room.perform("replay", rejected, endpoint="next", base="next")
    assert (job.status, job.reason) == ("failed", "guard_rejected")
    with room.database.read() as connection:
        chain = versions.lineage(connection, TENANT, job.version_id or "")
    assert [v.status for v in chain] == ["rejected", "rejected", "ready"]
