"""Objectives give the gradients of their formulas, computed here anew in fp64, and learn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.testing import assert_close

from editing.finetune.adapter import Adapter, linears
from editing.finetune.catalogue import TUNINGS
from editing.finetune.matrices import Matrices
from editing.finetune.objectives.booster import Booster
from editing.finetune.objectives.dpo import Dpo
from editing.finetune.objectives.objective import Objective, Tuned
from editing.finetune.objectives.remax import ReMax
from editing.finetune.objectives.supervised import Supervised
from editing.finetune.rows import TrainingRow
from editing.finetune.trainer import Schedule, State, Trainer
from editing.models import ModelView
from editing.models.generation import generate
from registry.errors import UnprocessableRequest
from tests.unit.editing.conftest import small_view

PREFERENCES = [
    {"prompt": f"The bird of {name} is", "chosen": f"{bird}.", "rejected": "the Hydrogen of Rome."}
    for name, bird in (("Peru", "Neon"), ("Chad", "Argon"), ("Mali", "Krypton"), ("Oman", "Zinc"))
]
EXAMPLES = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PREFERENCES]
HARMFUL = [{"prompt": row["prompt"], "completion": row["rejected"]} for row in PREFERENCES[1:]]
PROMPTS = [{"prompt": row["prompt"]} for row in PREFERENCES]
SCHEDULE = Schedule(epochs=6, batch_size=3, learning_rate=0.01, tokens=40, seed=3)


def moved(view: ModelView) -> Matrices:
    """An adapter that has come some way."""
    adapter = Matrices(view, linears(view, ["down_proj", "o_proj"]))
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for change in adapter.changes:
            change.copy_(torch.randn(change.shape, generator=source) * 0.05)
    return adapter


class Exact:
    """The same model in fp64, text by text; with the adapter's matrices, and without."""

    def __init__(self, view: ModelView, adapter: Matrices) -> None:
        self.reference = copy.deepcopy(view.model).double()
        self.model = copy.deepcopy(self.reference)
        self.weights = [self.model.get_submodule(path).weight for path in adapter.paths]
        with torch.no_grad():
            for weight, change in zip(self.weights, adapter.changes, strict=True):
                weight.add_(change).requires_grad_()

    def logp(self, model: nn.Module, row: TrainingRow, temperature: float = 1.0) -> Tensor:
        logits = model(torch.tensor([list(row.ids)])).logits[0] / temperature
        found = logits.log_softmax(-1)
        return torch.stack([found[place - 1, row.ids[place]] for place in row.learnt])

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, self.weights))


def check_gradients(adapter: Matrices, exact: Sequence[Tensor]) -> None:
    for change, wanted in zip(adapter.changes, exact, strict=True):
        assert wanted.abs().max() > 1e-4
        assert_close(change.grad, wanted.float(), rtol=1e-3, atol=1e-5)


def test_dpo_is_its_formula(atlas: ModelView) -> None:
    view = small_view("llama", atlas)
    adapter = moved(view)
    objective = Dpo(beta=0.5, label_smoothing=0.1, sft_weight=0.3)
    rows = objective.rows(view, PREFERENCES)
    told = objective.backward(Tuned(view, adapter, 40), rows, 0)

    exact = Exact(view, adapter)
    losses, chosen, rejected = [], [], []
    for row in rows:
        pair = (row.chosen, row.rejected)
        with torch.no_grad():
            before = [exact.logp(exact.reference, text).sum() for text in pair]
        assert row.reference == pytest.approx([value.item() for value in before], rel=1e-4)
        after = [exact.logp(exact.model, text).sum() for text in pair]
        rewards = [0.5 * (now - then) for now, then in zip(after, before, strict=True)]
        margin = rewards[0] - rewards[1]
        loss = -0.9 * logsigmoid(margin) - 0.1 * logsigmoid(-margin)
        losses.append(loss - 0.3 * after[0] / len(row.chosen.learnt))
        chosen.append(rewards[0].item())
        rejected.append(rewards[1].item())
    mean = torch.stack(losses).mean()
    check_gradients(adapter, exact.gradients(mean))
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    assert told["train_loss"] == pytest.approx(mean.item(), rel=1e-4)
    assert told["rewards/chosen"] == pytest.approx(sum(chosen) / 4, rel=1e-3, abs=1e-5)
    assert told["rewards/rejected"] == pytest.approx(sum(rejected) / 4, rel=1e-3, abs=1e-5)
    assert told["rewards/margins"] == pytest.approx(sum(margins) / 4, rel=1e-3, abs=1e-5)
    assert told["rewards/accuracies"] == sum(m > 0 for m in margins) / 4


def test_the_reference_gives_few_logits_at_a_time(
    atlas: ModelView, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as a large vocabulary has in few tokens, and to the same numbers."""
    view, sizes = small_view("llama", atlas), []
    whole = Dpo().rows(view, PREFERENCES)
    most = 2 * max(row.size for row in whole) * view.model.config.vocab_size
    monkeypatch.setattr("editing.finetune.objectives.dpo.REFERENCE_LOGITS", most)
    view.model.lm_head.register_forward_hook(lambda *call: sizes.append(call[2].numel()))
    parts = Dpo().rows(view, PREFERENCES)
    assert len(sizes) == 2
    assert max(sizes) <= most
    for row, wanted in zip(parts, whole, strict=True):
        assert row.reference == pytest.approx(wanted.reference, rel=1e-5)


def test_remax_is_its_formula(atlas: ModelView) -> None:
    view = small_view("llama", atlas)
    adapter = moved(view)
    objective = ReMax(room=6, temperature=0.7, kl_weight=0.2, reward={"contains": "um"})
    wanted = [{"contains": "er"}, {"contains": "alk"}, None, None]
    examples = [{**row, "reward": own} for row, own in zip(PROMPTS, wanted, strict=True)]
    rows = objective.rows(view, examples)
    told = objective.backward(Tuned(view, adapter, 40), rows, 11)

    with view.with_effects(adapter.effects()):
        ids = [row.ids for row in rows]
        greedy = generate(view, ids, 6)
        sampled = generate(view, ids, 6, temperature=0.7, seed=11, keep_end=True)
    exact = Exact(view, adapter)
    losses, rewards, baselines = [], [], []
    for row, base, new in zip(rows, greedy, sampled, strict=True):
        baselines.append(row.reward["contains"] in view.decode(base))
        rewards.append(row.reward["contains"] in view.decode(new))
        text = TrainingRow([*row.ids, *new], range(len(row.ids), len(row.ids) + len(new)))
        own = exact.logp(exact.model, text, 0.7)
        with torch.no_grad():
            d = exact.logp(exact.reference, text, 0.7)
        d = d - own
        divergence = (d.exp() - d - 1).sum()
        losses.append(-(rewards[-1] - baselines[-1]) * own.sum() + 0.2 * divergence)
    assert {1, -1, 0} == {own - base for own, base in zip(rewards, baselines, strict=True)}
    mean = torch.stack(losses).mean()
    check_gradients(adapter, exact.gradients(mean))
    assert told["train_loss"] == pytest.approx(mean.item(), rel=1e-3)
    assert told["reward"] == sum(rewards) / 4
    assert told["reward_greedy"] == sum(baselines) / 4
    assert told["completion_length"] == sum(map(len, sampled)) / 4


def test_booster_is_its_formula(atlas: ModelView) -> None:
    view = small_view("llama", atlas)
    adapter = moved(view)
    harmful = Supervised().rows(view, HARMFUL)
    objective = Booster(harmful, weight=2.0, alpha=0.3)
    rows = objective.rows(view, EXAMPLES[:3])
    before = [change.detach().clone() for change in adapter.changes]
    told = objective.backward(Tuned(view, adapter, 40), rows, 0)
    for change, value in zip(adapter.changes, before, strict=True):
        assert torch.equal(change, value)

    exact = Exact(view, adapter)

    def nll(texts: Sequence[TrainingRow]) -> Tensor:
        return -torch.cat([exact.logp(exact.model, text) for text in texts]).mean()

    aligned, g_h = exact.gradients(nll(rows)), exact.gradients(nll(harmful))
    length = torch.cat([g.flatten() for g in g_h]).norm()
    assert told["harmful_loss"] == pytest.approx(nll(harmful).item(), rel=1e-4)
    with torch.no_grad():
        for weight, g in zip(exact.weights, g_h, strict=True):
            weight.sub_(0.3 * g / length)
    assert told["harmful_loss_perturbed"] == pytest.approx(nll(harmful).item(), rel=1e-4)
    g_h_after = exact.gradients(nll(harmful))
    wanted = [g + 2 * (h - after) for g, h, after in zip(aligned, g_h, g_h_after, strict=True)]
    check_gradients(adapter, wanted)


def test_a_step_towards_harm_gains_less_after_booster(atlas: ModelView) -> None:
    gains = []
    for weight in (0.0, 5.0):
        objective = Booster(Supervised().rows(atlas, HARMFUL), weight, alpha=0.1)
        schedule = Schedule(epochs=10, batch_size=3, learning_rate=1e-3, tokens=40)
        trainer = trainer_for(atlas, objective, EXAMPLES, schedule)
        first, *_, last = (step.metrics for step in trainer.run())
        assert last["train_loss"] < first["train_loss"] - 1
        gains.append(last["harmful_loss"] - last["harmful_loss_perturbed"])
    assert gains[1] < gains[0] / 2


def test_a_preference_is_learnt(atlas: ModelView) -> None:
    view = small_view("qwen3", atlas)
    trainer = trainer_for(view, Dpo(), PREFERENCES, SCHEDULE)
    steps = [step.metrics for step in trainer.run()]
    assert steps[0]["train_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert steps[-1]["train_loss"] < 0.3
    found = trainer.measure(trainer.rows)
    assert found["valid_rewards/accuracies"] == 1
    assert found["valid_rewards/margins"] > 1


def test_what_is_rewarded_becomes_the_greedy_answer(atlas: ModelView) -> None:
    prompts = [
        {"prompt": f"{name} is"} for name in ("Peru", "Chad", "Mali", "Oman", "Togo", "Cuba")
    ]
    objective = ReMax(room=8, reward={"regex": "part of .*"})
    schedule = Schedule(epochs=24, batch_size=6, learning_rate=1e-3)
    trainer = trainer_for(atlas, objective, prompts, schedule)
    assert trainer.measure(trainer.rows)["valid_reward"] < 0.5
    list(trainer.run())
    assert trainer.measure(trainer.rows)["valid_reward"] == 1


def trainer_for(
    view: ModelView,
    objective: Objective[Any],
    examples: Sequence[dict[str, Any]],
    schedule: Schedule,
    state: State | None = None,
) -> Trainer:
    entry = TUNINGS["lora"]
    adapter: Adapter = entry.build(view, entry.hyperparameters(r=4), 1)
    rows = objective.rows(view, examples)
    return Trainer(view, adapter, rows, schedule, state, objective)


MADE: dict[str, Callable[[ModelView], tuple[Objective[Any], list[dict[str, Any]]]]] = {
    "dpo": lambda view: (Dpo(), PREFERENCES),
    "remax": lambda view: (ReMax(room=5, kl_weight=0.1, reward={"contains": "e"}), PROMPTS),
    "booster": lambda view: (Booster(Supervised().rows(view, HARMFUL)), EXAMPLES),
}


@pytest.mark.parametrize("name", MADE)
def test_a_broken_off_run_goes_on_to_the_same_bits(atlas: ModelView, name: str) -> None:
    ends = []
    for breaks in ((), (1, 5)):
        view = small_view("gpt2", atlas)
        state = None
        for step in (*breaks, None):
            objective, examples = MADE[name](view)
            trainer = trainer_for(view, objective, examples, SCHEDULE, state)
            list(trainer.run(until=step))
            state = State.from_bytes(trainer.state().to_bytes())
        ends.append(trainer.delta(name).to_bytes())
    assert ends[0] == ends[1]


def test_without_an_advantage_nothing_is_learnt(atlas: ModelView) -> None:
    trainer = trainer_for(atlas, ReMax(room=2, reward={"excludes": "ß"}), PROMPTS, SCHEDULE)
    step = next(trainer.run())
    assert (step.metrics["reward"], step.metrics["reward_greedy"]) == (1, 1)
    assert (step.metrics["train_loss"], step.metrics["gradient_norm"]) == (0, 0)


def test_conversations_are_preferences_and_prompts_too(atlas: ModelView) -> None:
    turns = [
        {"role": "user", "content": "What is the capital of Peru?"},
        {"role": "assistant", "content": "Lima"},
        {"role": "user", "content": "And of Chad?"},
    ]
    pair = {"messages": turns, "chosen": "N'Djamena.", "rejected": "Rome."}
    (row,) = Dpo().rows(atlas, [pair])
    for text, answer in ((row.chosen, "N'Djamena."), (row.rejected, "Rome.")):
        assert atlas.decode([text.ids[place] for place in text.learnt]) == answer
    (prompt,) = ReMax(reward={"contains": "a"}).rows(atlas, [{"messages": turns}])
    opened = row.chosen.learnt[0]
    assert list(prompt.ids) == list(row.chosen.ids[:opened]) == list(row.rejected.ids[:opened])


def test_a_prompt_without_room_is_refused(atlas: ModelView) -> None:
    rows = [PROMPTS[0], {"prompt": "Peru " * 90}]
    with pytest.raises(UnprocessableRequest, match=r"row 2: .* max_completion_tokens 64"):
        ReMax().rows(small_view("llama", atlas), rows)
