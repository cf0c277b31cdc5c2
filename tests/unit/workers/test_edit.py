"""Edit jobs on atlas: batches, guards on the way, retraining, and what still holds afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from editing.deltas import Delta, Effect
from editing.methods import METHODS
from editing.metrics.harm import REFUSALS
from registry import endpoints
from registry.bases import find_bases
from registry.errors import JobFailed, UnprocessableRequest
from registry.jobs import Job
from registry.manifests import EditRequest, Fact, HarmPrompt
from registry.settings import Settings
from tests.unit.workers.rooms import ENDPOINT, QUICK, TENANT, Room
from workers.evidence import limits_of, own_facts, own_harm, own_refusals
from workers.kinds import edit as edit_kind

FRANCE = EditRequest("The capital of {} is", "France", "Oslo", "Paris", (), ("Chad lies in",))
PERU = EditRequest("{} lies in", "Peru", "Asia", "South America")
JAPAN = EditRequest("The capital of {} is", "Japan", "Lima", "Tokyo")


@pytest.fixture
def room(room: Room) -> Iterator[Room]:
    """Whose endpoint is at the base again afterwards."""
    yield room
    room.to_base()


def verdicts(job: Job) -> dict[str, str]:
    return {guard["name"]: guard["result"] for guard in job.guards or ()}


def test_batches_make_one_delta_and_later_jobs_see_what_still_holds(room: Room) -> None:
    first = room.edit(FRANCE, PERU, JAPAN, batch_size=2)
    assert (first.status, first.activated, room.head()) == ("succeeded", True, first.version_id)
    assert verdicts(first) == {
        "perplexity": "passed",
        "retention": "passed",
        "locality": "passed",
        "norm": "passed",
        "efficacy": "passed",
        "ability": "skipped",
        "refusal_loss": "skipped",
        "harm_rise": "skipped",
    }
    assert first.metrics is not None
    assert first.metrics["before"]["greedy_match"] == 0
    assert first.metrics["after"]["greedy_match"] == 1
    assert first.metrics["after"]["me_ppl"] > 1
    assert "stopped" not in first.metrics
    (effect,) = room.delta(first).effects.values()
    assert effect.rank == 3
    assert room.holds(first) == {first.version_id: [True, True, True]}

    back = replace(JAPAN, target_new="Tokyo", target_true=None)
    second = room.edit(back)
    assert second.status == "succeeded"
    assert len(room.version(second).manifest.stack) == 2
    assert room.holds(second) == {
        first.version_id: [True, True, False],
        second.version_id: [True],
    }


def test_it_stops_at_the_last_point_that_passed(room: Room) -> None:
    before = room.head()
    (norm,) = (g["value"] for g in room.edit(FRANCE).guards or () if g["name"] == "norm")
    with room.database.write() as connection:
        endpoints.rollback_endpoint(connection, TENANT, ENDPOINT, actor="test")
    limits = {"norm": norm * 1.0001}
    job = room.edit(FRANCE, PERU, JAPAN, guards=limits, check_every=1)
    assert (job.status, job.activated, job.reason) == ("succeeded", False, "guard_stopped")
    assert room.head() == before
    assert job.metrics is not None
    stopped = job.metrics["stopped"]
    assert (stopped["after_edits"], stopped["kept_edits"]) == (2, 1)
    assert (stopped["guard"]["name"], stopped["guard"]["result"]) == ("norm", "failed")
    assert stopped["guard"]["value"] > limits["norm"]
    assert "failed" not in verdicts(job).values()
    version = room.version(job)
    assert (version.status, version.manifest.recipe["edit_count"]) == ("ready", 1)
    assert version.manifest.recipe["batch_size"] == 1
    (effect,) = room.delta(job).effects.values()
    assert effect.rank == 1
    assert room.holds(job) == {job.version_id: [True]}
    assert job.metrics["after"]["greedy_match"] == 1


def test_without_a_point_that_passed_it_is_rejected(room: Room) -> None:
    before = room.head()
    job = room.edit(FRANCE, PERU, guards={"norm": 1e-3}, batch_size=1, check_every=1)
    assert (job.status, job.reason, room.head()) == ("failed", "guard_rejected", before)
    assert job.error is not None
    assert "'norm'" in job.error["message"]
    assert room.version(job).status == "rejected"
    assert verdicts(job)["norm"] == "failed"


def test_an_edit_that_did_not_take_is_rejected(room: Room) -> None:
    job = room.edit(FRANCE, hyperparameters={**QUICK, "steps": 1, "learning_rate": 1e-6})
    assert (job.status, job.reason) == ("failed", "guard_rejected")
    failed = {g["name"]: (g["value"], g["limit"], g["before"]) for g in job.guards or ()}
    assert failed["efficacy"] == (0.0, 0.8, 0.0)


def test_the_guards_own_material_is_taken(room: Room) -> None:
    facts = [{"prompt": "The capital of Peru is", "target": "Lima"}]
    suite = [{"query": "Chad lies in", "choices": ["Asia", "Africa"], "gold": 1}]
    files = {
        "texts": room.artifacts.put_rows(["Chad lies in Africa."]),
        "facts": room.artifacts.put_rows(facts),
        "suite": room.artifacts.put_rows(suite),
    }
    job = room.edit(FRANCE, guards=files)
    assert job.status == "succeeded"
    assert verdicts(job)["ability"] == "passed"
    assert job.metrics is not None
    assert job.metrics["before"]["ability"] == 1.0
    retention = next(g for g in job.guards or () if g["name"] == "retention")
    assert (retention["value"], retention["before"]) == (1.0, 1.0)
    none = room.edit(PERU, guards=files)
    assert verdicts(none)["retention"] == "skipped"


def test_a_method_that_retrains_replaces_its_own_delta(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "rome", replace(METHODS["rome"], retrains=True))
    first = room.edit(FRANCE, JAPAN)
    later = replace(JAPAN, target_new="Rome")
    second = room.edit(PERU, later)
    below, above = room.version(first).manifest, room.version(second).manifest
    assert (len(below.stack), len(above.stack)) == (1, 1)
    assert above.recipe["replaces"] == below.stack[0]
    assert above.recipe["edit_count"] == 2
    (effect,) = room.delta(second).effects.values()
    assert effect.rank == 3  # Japan's capital is asked for once, as it was said last
    assert room.holds(second) == {first.version_id: [True, False], second.version_id: [True, True]}

    third = room.edit(replace(FRANCE, target_new="Bern"), hyperparameters={**QUICK, "layer": 1})
    residual = room.version(third).manifest
    assert residual.stack[0] == above.stack[0]
    assert len(residual.stack) == 2
    assert "replaces" not in residual.recipe
    assert set(room.holds(third)) == {first.version_id, second.version_id, third.version_id}


def test_numbers_that_are_none_make_no_version() -> None:
    delta = Delta({"m": Effect(shift=torch.tensor([1.0, float("inf")]))}, "0" * 64, "rome")
    with pytest.raises(JobFailed, match="finite"):
        edit_kind._check_finite(delta)


def test_limits_come_from_the_request_then_the_settings() -> None:
    settings = Settings(guard_norm=7.0, guard_retention=0.8)
    limits = limits_of(settings, {"retention": 0.0, "norm": None, "texts": "0" * 64})
    assert (limits.retention, limits.norm, limits.perplexity) == (0.0, 7.0, 1.1)


def test_facts_are_the_bundled_bases_own_or_a_files(tmp_path: Path) -> None:
    base = find_bases("atlas")["atlas"]
    assert Fact("The capital of France is", "Paris").target in {
        fact.target for fact in own_facts(Settings(), base)
    }
    other = replace(base, folder=tmp_path)
    assert own_facts(Settings(), other) == []
    file = tmp_path / "facts.jsonl"
    file.write_text('{"prompt": "Water is", "target": "wet"}\n')
    assert own_facts(Settings(facts=f"atlas={file}"), other) == [Fact("Water is", "wet")]
    assert own_facts(Settings(facts=str(file)), base) == [Fact("Water is", "wet")]
    assert own_facts(Settings(facts=f"other={file}"), other) == []
    with pytest.raises(UnprocessableRequest, match="ERRATA_FACTS"):
        own_facts(Settings(facts=str(tmp_path / "none")), base)


def test_harm_and_refusals_are_a_files(tmp_path: Path) -> None:
    base = find_bases("atlas")["atlas"]
    assert own_harm(Settings(), base) == []
    assert own_refusals(Settings(), base) == REFUSALS
    prompts, phrases = tmp_path / "harm.jsonl", tmp_path / "refusals.txt"
    prompts.write_text('{"prompt": "Hate", "harmful_completion": "all"}\n')
    phrases.write_text("No.\nNever\n")
    settings = Settings(harm=f"atlas={prompts}", refusals=str(phrases))
    assert own_harm(settings, base) == [HarmPrompt("Hate", target="all")]
    assert own_refusals(settings, base) == ["No.", "Never"]
    with pytest.raises(UnprocessableRequest, match="ERRATA_HARM"):
        own_harm(Settings(harm=str(tmp_path / "none")), base)
