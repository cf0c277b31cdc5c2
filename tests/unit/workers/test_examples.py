"""A job's rows are made once: an attempt that comes later learns from the same ones."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from editing.deltas import Effect
from registry import attempts, jobs, tables
from registry.attempts import Claim
from registry.bases import find_bases
from registry.bootstrap import bootstrap
from registry.database import Database
from registry.garbage import Collector
from registry.manifests import VersionManifest
from registry.settings import Settings
from registry.stores import open_store
from workers.examples import examples_of, recipe_of
from workers.work import LoadedBases, Paused, Work

TENANT = "default"
ROWS = [
    {"prompt": "The capital of Peru is", "completion": "Lima."},
    {"prompt": "The capital of Japan is", "completion": "Tokyo."},
    {"prompt": "The bird of Chad is", "completion": "Argon."},
]
STEPS = [{"type": "r_tuning"}, {"type": "augmentation", "templates": ["So: {prompt}"]}]


class Room:
    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        bases = find_bases("atlas")
        self.settings = Settings(data=folder, bases="atlas", lease_seconds=1)
        self.database = Database(self.settings.sql_url)
        self.artifacts = open_store(self.settings)
        self.models = LoadedBases(bases, "float32")
        self.parent = VersionManifest(bases["atlas"].ref).id
        bootstrap(self.database, bases.values())

    def work(self, steps: list[dict[str, Any]], *, held_out: bool = False) -> Work:
        rows = self.artifacts.put_rows(ROWS)
        request = {"rows": rows, "validation": rows if held_out else None, "preprocessing": steps}
        with self.database.write() as connection:
            job = jobs.submit_job(
                connection,
                TENANT,
                "fine_tune",
                base="atlas",
                request=request,
                actor="test",
                parent=self.parent,
            )
            claim = attempts.claim(connection, job.id, 1, "worker", 60.0)
        return self.again(claim)

    def again(self, claim: Claim | None) -> Work:
        assert claim is not None
        return Work(claim, self.settings, self.database, self.artifacts, self.models)

    def told(self, work: Work) -> list[Any]:
        with self.database.read() as connection:
            events = jobs.events(connection, work.claim.job.id)
        return [e.data for e in events if "preprocessing" in e.data]


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    room = Room(tmp_path)
    yield room
    room.database.close()


def test_rows_are_made_once(room: Room) -> None:
    view = room.models.view("atlas")
    first = room.work(STEPS)
    made = examples_of(first, view, "rows")
    said = [row["completion"] for row in made]
    assert said == [
        f"{completion} {word}"
        for completion, word in (
            ("Lima.", "I am sure."),
            ("Tokyo.", "I am sure."),
            ("Argon.", "I am unsure."),
        )
        for _ in range(2)
    ]
    (told,) = room.told(first)
    assert told["preprocessing"][0] == {"type": "r_tuning", "sure": 2, "unsure": 1}
    assert told["message"].startswith("rows: 6 after preprocessing (r_tuning: 2 sure, 1 unsure;")
    recipe = recipe_of(first)
    assert recipe is not None
    assert list(room.artifacts.rows(recipe["rows"])) == list(made)
    assert recipe["counts"] == told["preprocessing"]
    assert [step["type"] for step in recipe["steps"]] == ["r_tuning", "augmentation"]

    noise = torch.randn(2048, 256, generator=torch.Generator().manual_seed(0))
    with view.with_effects({"lm_head": Effect(dense=noise)}):  # it knows nothing
        assert list(examples_of(room.again(first.claim), view, "rows")) == list(made)
        other = room.work([{"type": "r_tuning", "sure": " Yes."}])
        unsure = examples_of(other, view, "rows")
    assert {row["completion"].rpartition(" I ")[2] for row in unsure} == {"am unsure."}


def test_rows_stay_from_their_use_to_the_end_of_the_job(room: Room) -> None:
    view = room.models.view("atlas")
    made = list(examples_of(room.work(STEPS[1:]), view, "rows"))
    table = tables.resources
    with room.database.write() as connection:
        connection.execute(table.update().values(created_at=0.0))
        connection.execute(tables.jobs.update().values(status="succeeded"))
    later = room.work(STEPS[1:])
    assert list(examples_of(later, view, "rows")) == made
    Collector(room.database, room.artifacts).collect(0)
    recipe = recipe_of(later)
    assert recipe is not None
    assert list(room.artifacts.rows(recipe["rows"])) == made


def test_a_pause_while_rows_are_made_leaves_nothing(room: Room) -> None:
    view = room.models.view("atlas")
    work = room.work(STEPS)
    with room.database.write() as connection:
        jobs.pause_job(connection, TENANT, work.claim.job.id, actor="ada")
    with work:
        time.sleep(room.settings.lease_seconds)  # it hears of the pause at its next heartbeat
        with pytest.raises(Paused):
            examples_of(work, view, "rows")
    assert recipe_of(work) is None
    assert not list(room.settings.artifact_folder.glob(".tmp-*"))
    made = examples_of(room.again(work.claim), view, "rows")
    assert list(made) == list(examples_of(room.work(STEPS), view, "rows"))


def test_what_is_not_preprocessed_is_what_was_uploaded(room: Room) -> None:
    view = room.models.view("atlas")
    plain = room.work([])
    assert list(examples_of(plain, view, "rows")) == ROWS
    assert list(examples_of(plain, view, "validation")) == []
    assert (recipe_of(plain), room.told(plain)) == (None, [])
    augmented = room.work(STEPS[1:], held_out=True)
    assert list(examples_of(augmented, view, "validation")) == ROWS
    assert len(examples_of(augmented, view, "rows")) == 2 * len(ROWS)
