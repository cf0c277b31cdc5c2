"""A fine-tuning that is paused goes on where it stood, and makes every version that it promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from editing.finetune.catalogue import TUNINGS
from editing.finetune.rows import TrainingRow
from editing.finetune.trainer import Schedule, Trainer
from editing.models import ModelView
from registry.bases import Base
from registry.checkpoints import list_checkpoints
from registry.database import Database
from registry.manifests import BaseRef, Progress, VersionManifest
from tests.models import CONTEXT, random_model, small_tokenizer
from tests.unit.workers.test_work import work_on
from workers.kinds.fine_tune import Judged, _state, _trained
from workers.work import Paused, Work

SCHEDULE = Schedule(epochs=3, batch_size=2, learning_rate=0.01, seed=1)
ROWS = [TrainingRow([1, 2, place + 3, 4], range(1, 4)) for place in range(4)]


class Pressed(Work):
    """The user pauses it as it reports what it is told to wait for."""

    moment: str | None = None

    def report(self, progress: Progress) -> None:
        if self.moment is not None and progress.message.startswith(self.moment):
            self._paused.set()
        super().report(progress)


@pytest.fixture
def first(database: Database, tmp_path: Path) -> Work:
    return work_on(database, tmp_path)


def attempt(first: Work, moment: str | None) -> Judged:
    model = random_model("llama").requires_grad_(False)
    base = Base("atlas", Path("unused"), "0" * 64, "llama", 2, CONTEXT, False)
    view, entry = ModelView(model, small_tokenizer(), base), TUNINGS["lora"]
    adapter = entry.build(view, entry.hyperparameters(r=2), 1)
    work = Pressed(first.claim, first.settings, first.database, first.artifacts, first.models)
    work.moment = moment
    trainer = Trainer(view, adapter, ROWS, SCHEDULE, _state(work))

    def judged() -> Judged:
        work.report(Progress(trainer.step, trainer.total, f"measuring at {trainer.step}"))
        digest = work.artifacts.put(trainer.delta("lora").to_bytes())
        manifest = VersionManifest(BaseRef("atlas", "0" * 64), (digest,))
        return Judged(manifest, {"after": {}}, ())

    return _trained(work, trainer, [], judged)


@pytest.mark.parametrize("moment", ["step 2", "step 3", "measuring at 4", "measuring at 6"])
def test_a_pause_loses_no_step_and_no_version(
    first: Work, database: Database, tmp_path: Path, moment: str
) -> None:
    with pytest.raises(Paused):
        attempt(first, moment)
    with database.read() as connection:
        kept = list_checkpoints(connection, first.claim.job.id)
    assert f"{kept[-1].step}" == moment[-1]
    ended = attempt(first, None)
    with database.read() as connection:
        made = list_checkpoints(connection, first.claim.job.id)
    assert [checkpoint.step for checkpoint in made if checkpoint.version_id] == [2, 4]
    whole = Database(f"sqlite:///{tmp_path / 'whole.db'}")
    whole.migrate()
    assert attempt(work_on(whole, tmp_path), None).manifest == ended.manifest
    whole.close()
