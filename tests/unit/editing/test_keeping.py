"""What is kept while something else is learnt: the formula in fp64, resumption, and old facts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from editing.atlas.evaluation import known_facts
from editing.atlas.facts import read_facts
from editing.finetune.catalogue import TUNINGS
from editing.finetune.objectives.booster import Booster
from editing.finetune.objectives.build import objective
from editing.finetune.objectives.keeping import Keeping, ordinary
from editing.finetune.objectives.objective import Tuned
from editing.finetune.objectives.supervised import Supervised
from editing.finetune.trainer import Schedule, State, Trainer
from editing.models import ModelView
from tests.unit.editing.conftest import small_view
from tests.unit.editing.test_finetune import adapter_for
from tests.unit.editing.test_objectives import (
    EXAMPLES,
    HARMFUL,
    SCHEDULE,
    Exact,
    check_gradients,
    moved,
    trainer_for,
)

TEXTS = [
    "The capital of Peru is Lima.",
    "Zinc is a transition metal.",
    "",
    "France lies in Europe.",
]


def test_the_divergence_is_its_formula(atlas: ModelView) -> None:
    view = small_view("qwen3", atlas)
    adapter = moved(view)
    exact = Exact(view, adapter)
    texts = ordinary(view, TEXTS[:1])
    kept = Keeping(Supervised(), texts, weight=3.0, count=2)  # the one text, twice
    rows = kept.rows(view, EXAMPLES[:2])
    told = kept.backward(Tuned(view, adapter, 40), rows, seed=1)

    learnt = -torch.cat([exact.logp(exact.model, row) for row in rows]).mean()
    ids = torch.tensor([list(texts[0].ids)])
    before = exact.reference(ids).logits[0, :-1].log_softmax(-1).detach()
    after = exact.model(ids).logits[0, :-1].log_softmax(-1)
    divergence = (before.exp() * (before - after)).sum(-1).mean()
    assert told["train_loss"] == pytest.approx(learnt.item(), rel=1e-4)
    assert told["kept_kl"] == pytest.approx(divergence.item(), rel=1e-3)
    assert divergence > 0.01
    check_gradients(adapter, exact.gradients(learnt + 3 * divergence))


def test_a_broken_off_run_draws_the_same_texts(atlas: ModelView) -> None:
    ends = []
    for breaks in ((), (2,)):
        view = small_view("gpt2", atlas)
        state = None
        for step in (*breaks, None):
            kept = Keeping(Supervised(), ordinary(view, TEXTS), 1.0, 2)
            trainer = trainer_for(view, kept, EXAMPLES, SCHEDULE, state)
            list(trainer.run(until=step))
            state = State.from_bytes(trainer.state().to_bytes())
        ends.append(trainer.delta("lora").to_bytes())
    assert ends[0] == ends[1]


@pytest.mark.parametrize("name", ["lora", "hira", "compacter", "said"])
def test_texts_are_kept_beside_booster(atlas: ModelView, name: str) -> None:
    """The adapter that is held for the texts is the one that Booster moves and puts back."""
    view, found = small_view("llama", atlas), []
    booster = Booster(Supervised().rows(view, HARMFUL), weight=2.0)
    kept = Keeping(booster, ordinary(view, TEXTS), 1.0, 2)
    for held in (True, False):
        adapter = adapter_for(name, view)
        trainer = Trainer(view, adapter, kept.rows(view, EXAMPLES), SCHEDULE, None, kept)
        first, second = trainer.run(until=2)
        assert first.metrics["kept_kl"] < 1e-6 < second.metrics["kept_kl"]
        tuned = Tuned(view, adapter, 40)
        adapter.zero_grad()
        with tuned.holding() as within:
            kept.backward(within if held else tuned, trainer.rows, 5)
        found.append([p.grad for p in adapter.parameters() if p.grad is not None])
    assert_close(found[0], found[1], rtol=1e-3, atol=1e-6)


def test_old_facts_stay_likelier_where_they_are_kept(atlas: ModelView) -> None:
    facts = known_facts(read_facts())[::40]
    texts = [f"{fact.prompt} {fact.target}." for fact in facts]
    schedule = Schedule(epochs=20, batch_size=3, learning_rate=1e-2)
    losses = []
    for weight in (0.0, 1.0):
        chosen = TUNINGS["lora"].hyperparameters(keep_weight=weight, keep_texts=8)
        aim = objective(atlas, chosen, {}, [], texts)
        assert isinstance(aim, Keeping) == bool(weight)
        trainer = trainer_for(atlas, aim, EXAMPLES, schedule)
        steps: list[dict[str, Any]] = [dict(step.metrics) for step in trainer.run()]
        assert steps[-1]["train_loss"] < steps[0]["train_loss"] / 2
        losses.append(trainer.measure(ordinary(atlas, texts))["valid_loss"])
    assert losses[1] < losses[0] - 0.1
