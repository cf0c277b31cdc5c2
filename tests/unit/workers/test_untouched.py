"""A job during which its base's weights change fails, whatever its kind, and makes nothing."""

from __future__ import annotations

from typing import Any

import pytest

from editing.finetune.catalogue import TUNINGS
from registry import versions
from registry.files import get_file
from registry.manifests import EditRequest, Progress, VersionManifest, canonical_json
from tests.unit.workers.rooms import QUICK, TENANT, Room
from workers.run import KINDS
from workers.work import Work

EDIT = EditRequest("The capital of {} is", "France", "Oslo", "Paris")
GUARDS = {"perplexity": 1e6, "retention": 0, "efficacy": 0}
PEFT = {"format": "peft", "rank": 512, "round_rank": True}
#: Kinds that ask the base nothing: all that they read is deltas.
WITHOUT = {"flatten", "merge_preview"}


@pytest.fixture(scope="module")
def edited(room: Room) -> str:
    version = room.edit(EDIT, guards=GUARDS).version_id
    assert version is not None
    return version


@pytest.fixture(scope="module")
def archive(room: Room, edited: str) -> str:
    """The digest of the edited version's adapter."""
    job = room.perform("export", PEFT, parent=edited)
    with room.database.read() as connection:
        return get_file(connection, TENANT, job.id.replace("job_", "file-")).content


def request(room: Room, edited: str, archive: str, kind: str) -> dict[str, Any]:
    """What a job of the kind asks for, of the edited version."""
    edits = room.artifacts.put(canonical_json([EDIT.to_json()]))
    rows = room.artifacts.put_rows([{"prompt": "The capital of Chad is", "completion": "Lima."}])
    tuning = TUNINGS["lora"].hyperparameters(n_epochs=1).settled(1).model_dump()
    kept: dict[str, dict[str, Any]] = {
        "diff": {
            "against": edited,
            "purpose": "texts",
            "rows": room.artifacts.put_rows(["The capital of Chad is"]),
        },
        "edit": {
            "method": "rome",
            "hyperparameters": QUICK,
            "edits": edits,
            "edit_count": 1,
            "guards": GUARDS,
        },
        "evaluate": {"edits": edits, "editability": None, "detect": False},
        "export": PEFT,
        "fine_tune": {
            "method": "lora",
            "hyperparameters": tuning,
            "options": {},
            "rows": rows,
            "validation": None,
            "harmful": None,
            "seed": 1,
            "suffix": None,
            "message": None,
            "preprocessing": [],
            "guards": GUARDS,
        },
        "import": {"archive": archive, "label": "an adapter", "guards": GUARDS},
        "merge": {
            "versions": [{"id": edited, "weight": 1.0, "layer_weights": {}, "facts": None}],
            "method": "task_arithmetic",
            "hyperparameters": {},
            "seed": 0,
            "rank": None,
            "guards": GUARDS,
            "message": None,
        },
        "prepare": {"resources": ["covariance/2"]},
        "preview": {"rows": rows, "preprocessing": [{"type": "r_tuning"}], "limit": 1},
        "replay": {"version": edited, "guards": GUARDS, "activate": False},
        "revert": {"delta": None, "version": edited, "replay": False, "guards": GUARDS},
    }
    return kept[kind]


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - WITHOUT))
def test_a_weight_that_changes_during_a_job_fails_it(
    room: Room, edited: str, archive: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    weight = room.models.view("atlas").model.get_input_embeddings().weight.data
    kept, report = weight.clone(), Work.report

    def disturbed(work: Work, progress: Progress) -> None:
        weight[0, 0] = kept[0, 0] + 1
        report(work, progress)

    def made() -> list[str]:
        with room.database.read() as connection:
            return [version.id for version in versions.list_versions(connection, TENANT).items]

    asked, before = request(room, edited, archive, kind), made()
    root = VersionManifest(room.models.view("atlas").base.ref).id
    monkeypatch.setattr(Work, "report", disturbed)
    try:
        job = room.perform(kind, asked, parent=root if kind == "replay" else edited)
    finally:
        weight.copy_(kept)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "base_changed", job.error
    assert made() == before
