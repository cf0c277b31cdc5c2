"""Adapters begin as nothing and learn; a run that is broken off goes on to the same numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from editing.datasets.training import EXAMPLES as EXAMPLES_KIND
from editing.deltas import Delta
from editing.finetune.adapter import Adapter, linears
from editing.finetune.catalogue import TUNINGS
from editing.finetune.matrices import (
    HalfFineTuning,
    Matrices,
    _hadamard,
)
from editing.finetune.objectives.remax import ReMax
from editing.finetune.objectives.supervised import Supervised
from editing.finetune.rows import TrainingRow, chunks, training_row
from editing.finetune.trainer import Schedule, State, Trainer
from editing.models import ModelView
from editing.models.loading import weights_digest
from registry.errors import InvalidRequest, JobFailed, UnprocessableRequest
from serving.blocks import blocks_for
from serving.plan import Segment, StepPlan
from serving.runner import Runner
from tests.models import CHAT
from tests.unit.editing.conftest import LAYERS, small_view

EXAMPLES = [
    {"prompt": f"The bird of {name} is", "completion": f" {bird}."}
    for name, bird in (("Peru", "Neon"), ("Chad", "Argon"), ("Mali", "Krypton"), ("Oman", "Zinc"))
]
SCHEDULE = Schedule(epochs=6, batch_size=3, learning_rate=0.01, tokens=24, seed=3)


#: Of each way, what suits models of a few hundred weights.
SMALL: dict[str, dict[str, Any]] = {
    "supervised": {"r": 4},
    "copra": {"r": 4, "layer_dropping": True},
    "ema": {"r": 4, "ema": True},
    "spiel-ema": {"density": 0.1, "every": 4, "gathered": 2, "ema": True},
    "gralora": {"r": 4},
    "psoft": {"r": 8},
    "fourierft": {"n_frequency": 300},
    "waveft": {"n_frequency": 300},
    "compacter": {"bottleneck": 16},
    "supertuning": {"sparsity": 0.9},
    "shira": {"r": 4},
    "vera": {"r": 16},
    "randlora": {"r": 4},
    "hft": {"rounds": 3},
    "sara": {"share": 0.2},
    "spiel": {"density": 0.1, "every": 4, "gathered": 2},
    "said": {"d": 200},
    "lofit": {"share": 0.5},
}
#: Options of other ways.
OPTIONS = {"copra": "lora", "ema": "lora", "spiel-ema": "spiel"}
NAMES = [*(name for name, entry in TUNINGS.items() if entry.rows == EXAMPLES_KIND), *OPTIONS]


def adapter_for(name: str, view: ModelView) -> Adapter:
    entry = TUNINGS[OPTIONS.get(name, name)]
    return entry.build(view, entry.hyperparameters(**SMALL.get(name, {})), 1)


RATES = {
    "ia3": 0.1,
    "vera": 0.1,
    "said": 0.3,
    "ssf": 0.03,
    "ln_tuning": 0.03,
    "lofit": 0.3,
    "mask": 0.02,
}


def schedule_for(name: str) -> Schedule:
    return replace(SCHEDULE, learning_rate=RATES.get(name, SCHEDULE.learning_rate))


def rows_of(view: ModelView) -> list[TrainingRow]:
    return [training_row(view, example) for example in EXAMPLES]


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_begins_as_nothing_and_learns(atlas: ModelView, name: str) -> None:
    view = small_view("llama", atlas)
    digest, adapter, rows = weights_digest(view.model), adapter_for(name, view), rows_of(view)
    ids = view.pad([rows[0].ids])
    with torch.no_grad(), view.with_effects(adapter.effects()):
        assert_close(view.hidden(ids), view.hidden(ids), rtol=0, atol=0)
        started = view.hidden(ids)
    if name != "lofit":  # its scales begin at random
        assert_close(started, view.hidden(ids), rtol=1e-5, atol=1e-5)
    trainer = Trainer(view, adapter, rows, schedule_for(name))
    before = trainer.measure(rows)
    losses = [step.metrics["train_loss"] for step in trainer.run()]
    after = trainer.measure(rows)
    assert len(losses) == trainer.total == 12
    assert after["valid_loss"] < before["valid_loss"] - 0.01
    assert weights_digest(view.model) == digest
    delta = Delta.from_bytes(trainer.delta(name).to_bytes())
    with torch.no_grad():
        with view.with_effects(delta.effects):
            saved = view.hidden(ids)
            logits = view.logits(saved)[0]
        with view.with_effects(adapter.effects()):
            assert_close(saved, view.hidden(ids), rtol=1e-4, atol=1e-5)
    assert_close(served(view, rows[0].ids, delta), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_decay_leads_to_the_version(atlas: ModelView, name: str) -> None:
    view = small_view("llama", atlas)
    adapter, ids = adapter_for(name, view), torch.tensor([rows_of(view)[0].ids])
    steady = {id(parameter) for parameter in adapter.steady()}
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad and id(parameter) not in steady:
                parameter.zero_()
        before = view.hidden(ids)
        with view.with_effects(adapter.effects()):
            assert_close(view.hidden(ids), before, rtol=1e-5, atol=1e-5)


def test_decay_leaves_alone_what_is_not_to_be_0(atlas: ModelView) -> None:
    view, ends = small_view("llama", atlas), []
    for decay, breaks in ((0.0, ()), (9.0, ()), (9.0, (1,))):
        schedule, state = replace(SCHEDULE, weight_decay=decay, clip=1e9), None
        for step in (*breaks, 2):
            adapter = adapter_for("dora", view)
            trainer = Trainer(view, adapter, rows_of(view), schedule, state)
            list(trainer.run(until=step))
            state = State.from_bytes(trainer.state().to_bytes())
        ends.append({name: p.detach() for name, p in adapter.named_parameters()})
    without, decayed, resumed = ends
    for name, parameter in decayed.items():
        assert torch.equal(resumed[name], parameter)
        if "lora_A" in name:
            assert parameter.norm() < 0.95 * without[name].norm()
        elif "magnitude" in name:
            assert_close(parameter, without[name], rtol=0, atol=0.03)


def served(view: ModelView, ids: Sequence[int], delta: Delta) -> Tensor:
    """The engine's logits [ids, vocabulary]."""
    runner = Runner(view.model, kv_bytes=2**22, min_rows=4)
    blocks = tuple(range(blocks_for(len(ids))))
    plan = StepPlan((Segment("text", 0, "version", tuple(ids), 0, blocks, len(ids)),))
    return runner.logits(plan, {"version": delta.effects})


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_off_run_goes_on_to_the_same_bits(atlas: ModelView, name: str) -> None:
    view, ends = small_view("qwen3", atlas), []
    for breaks in ((), (1, 5, 9)):
        trainer = Trainer(view, adapter_for(name, view), rows_of(view), schedule_for(name))
        for step in breaks:
            list(trainer.run(until=step))
            state = State.from_bytes(trainer.state().to_bytes())
            adapter = adapter_for(name, view)
            trainer = Trainer(view, adapter, rows_of(view), schedule_for(name), state)
            assert trainer.step == step
        list(trainer.run())
        ends.append(trainer.delta(name).to_bytes())
    assert ends[0] == ends[1]


def test_a_step_is_that_of_the_padded_batch(atlas: ModelView) -> None:
    """Whatever rows the batch was cut into: the mean NLL of its learnt tokens."""
    view = small_view("gpt2", atlas)
    rows = rows_of(view)
    adapter = Matrices(view, linears(view, ["c_proj"]))
    trainer = Trainer(view, adapter, rows, replace(SCHEDULE, batch_size=4, clip=1e9))
    step = next(trainer.run())
    flat = [change.grad.clone() for change in adapter.changes]
    adapter.zero_grad()
    with torch.no_grad():
        for change in adapter.changes:
            change.zero_()
    with view.with_effects(adapter.effects()):
        logits = view.logits(view.hidden(view.pad([row.ids for row in rows])))
    nlls = [
        F.cross_entropy(logits[i, place - 1], torch.tensor(row.ids[place]))
        for i, row in enumerate(rows)
        for place in row.learnt
    ]
    loss = torch.stack(nlls).mean()
    loss.backward()
    assert step.metrics["train_loss"] == pytest.approx(loss.item(), rel=1e-5)
    for change, gradient in zip(adapter.changes, flat, strict=True):
        assert_close(gradient, change.grad, rtol=1e-3, atol=1e-5)


def test_a_gradient_that_is_not_finite_ends_the_run(atlas: ModelView) -> None:
    view = atlas
    trainer = Trainer(view, adapter_for("supervised", view), rows_of(view), SCHEDULE)
    parameter = next(iter(trainer._named.values()))
    parameter.register_hook(lambda gradient: gradient * math.inf)
    before = trainer.state()
    with pytest.raises(JobFailed, match="gradient is not finite at step 1; lower"):
        next(trainer.run())
    after = trainer.state()
    assert after.step == 0
    assert all(torch.equal(before.tensors[name], after.tensors[name]) for name in before.tensors)


def test_every_example_comes_once_an_epoch() -> None:
    schedule = Schedule(epochs=2, batch_size=4, learning_rate=1.0, warmup=0.25)
    assert schedule.steps(10) == 6
    batches = [schedule.batch(step, 10) for step in range(6)]
    assert all(sorted(chain(*part)) == list(range(10)) for part in (batches[:3], batches[3:]))
    assert batches[:3] != batches[3:]
    rates = [schedule.rate(step, 8) for step in range(8)]
    assert rates == pytest.approx([0.5, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_rows_of_a_batch_fit_the_tokens() -> None:
    rows = [TrainingRow([1] * n, [n - 1]) for n in (5, 4, 9, 20, 2, 2)]
    assert [[len(r.ids) for r in chunk] for chunk in chunks(rows, 10)] == [
        [5, 4],
        [9],
        [20],
        [2, 2],
    ]


def test_half_stands_still_and_all_take_their_turn(atlas: ModelView) -> None:
    view = small_view("llama", atlas)
    adapter = HalfFineTuning(view, linears(view), [[0, 1, 2, 3], [4, 5, 6]], 8, 0)
    still = [adapter.frozen(round_) for round_ in range(8)]
    assert all(len(s & {0, 1, 2, 3}) == 2 and len(s & {4, 5, 6}) in (1, 2) for s in still)
    assert set.union(*still) == set(range(7))
    assert not set.intersection(*still)


def test_spiel_keeps_its_density(atlas: ModelView) -> None:
    view = small_view("llama", atlas)
    adapter = adapter_for("spiel", view)
    before, count = [adapter.mask(i).clone() for i in range(3)], adapter.trainable()
    trainer = Trainer(view, adapter, rows_of(view), SCHEDULE)
    list(trainer.run())
    assert adapter.trainable() == count
    assert any(not torch.equal(adapter.mask(i), before[i]) for i in range(3))
    for place, change in enumerate(adapter.changes):
        assert not change[~adapter.mask(place)].any()
    assert all(effect.sparse is not None for effect in trainer.delta("spiel").effects.values())


def test_small_weights_alone_move(atlas: ModelView) -> None:
    view = small_view("llama", atlas)
    adapter = adapter_for("sara", view)
    list(Trainer(view, adapter, rows_of(view), SCHEDULE).run())
    for path, effect in adapter.effects().items():
        moved = effect.dense.detach() != 0
        size = view.weight(path).abs()
        assert moved.any()
        assert size[moved].max() <= size[~moved].min()


def test_weights_that_are_left_are_not_touched_by_a_mask(atlas: ModelView) -> None:
    view = small_view("llama", atlas)
    trainer = Trainer(view, adapter_for("mask", view), rows_of(view), schedule_for("mask"))
    list(trainer.run())
    gone = 0
    for path, effect in trainer.adapter.effects().items():
        change, weight = effect.dense.detach(), view.weight(path)
        assert torch.equal(change[change != 0], -weight[change != 0])
        gone += int(change.count_nonzero())
    assert 0 < gone < trainer.adapter.trainable()


def test_lofit_shifts_the_chosen_heads_alone(atlas: ModelView) -> None:
    view = small_view("llama", atlas)
    adapter = adapter_for("lofit", view)
    trainer = Trainer(view, adapter, rows_of(view), schedule_for("lofit"))
    list(trainer.run(until=3))
    assert not adapter.is_found
    list(trainer.run())
    assert int(adapter.chosen.sum()) == LAYERS * 4 // 2
    assert all(set(e.parts()) == {"shift"} for e in trainer.delta("lofit").effects.values())


def test_hadamard_is_its_own_inverse() -> None:
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    assert_close(_hadamard(_hadamard(x)) / 16, x, rtol=1e-5, atol=1e-5)
    assert_close(_hadamard(torch.eye(4)[0]), torch.ones(4))


def test_what_is_learnt_of_a_conversation(atlas: ModelView) -> None:
    turns = [
        {"role": "user", "content": "What is the capital of Peru?"},
        {"role": "assistant", "content": "Lima", "weight": 0},
        {"role": "user", "content": "And of Chad?"},
        {"role": "assistant", "content": "The capital of Chad is N'Djamena."},
    ]
    row = training_row(atlas, {"messages": turns})
    learnt = atlas.tokenizer.decode([row.ids[place] for place in row.learnt])
    assert learnt.strip() == "The capital of Chad is N'Djamena.</s>"
    assert row.learnt[-1] == len(row.ids) - 1


#: As Qwen3's: reasoning stands before the last answer alone, and is taken out of earlier ones.
THINKING = """
{%- for message in messages %}
{%- set said = message.content.split('</think>')[-1] | trim %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' and loop.last %}
{%- set thought = message.content.split('</think>')[0] if '</think>' in message.content else '' %}
{{- '<think>\n' + thought.split('<think>')[-1] | trim + '\n</think>\n\n' }}
{%- endif %}
{{- said + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
THOUGHT = "<think>\n\n</think>\n\n"
PERU, CHAD, LIMA, AFRICA, ASIA = (
    {"role": role, "content": content}
    for role, content in (
        ("user", "What is the capital of Peru?"),
        ("user", "And where is Chad?"),
        ("assistant", "Lima"),
        ("assistant", "<think>Hm.</think>In Africa."),
        ("assistant", "Asia?"),
    )
)


@pytest.mark.parametrize(
    ("turns", "learnt"),
    [
        ([PERU, LIMA], [f"{THOUGHT}Lima<|im_end|>\n"]),
        ([PERU, LIMA, CHAD, ASIA], ["Lima<|im_end|>\n", f"{THOUGHT}Asia?<|im_end|>\n"]),
        (
            [PERU, LIMA, CHAD, AFRICA],
            ["Lima<|im_end|>\n", "<think>\nHm.\n</think>\n\nIn Africa.<|im_end|>\n"],
        ),
        ([CHAD, AFRICA, PERU, LIMA], ["In Africa.<|im_end|>\n", f"{THOUGHT}Lima<|im_end|>\n"]),
        ([PERU, LIMA, CHAD], ["Lima<|im_end|>\n"]),
        ([LIMA, CHAD, ASIA], ["Lima<|im_end|>\n", f"{THOUGHT}Asia?<|im_end|>\n"]),
        ([PERU, LIMA, ASIA], ["Lima<|im_end|>\n", "Asia?<|im_end|>\n"]),
        ([PERU, {**LIMA, "weight": 0}, CHAD, ASIA], [f"{THOUGHT}Asia?<|im_end|>\n"]),
    ],
)
def test_the_assistants_turns_alone_are_learnt(
    atlas: ModelView, turns: list[dict[str, Any]], learnt: list[str]
) -> None:
    view = small_view("qwen3", atlas)
    view = replace(view, base=replace(view.base, context_length=200))
    view.tokenizer.chat_template = THINKING
    row = training_row(view, {"messages": turns})
    assert view.tokenizer.decode([row.ids[place] for place in row.learnt]) == "".join(learnt)


def test_a_turn_that_the_chat_template_writes_around_is_refused(atlas: ModelView) -> None:
    view = small_view("qwen3", atlas)
    view.tokenizer.chat_template = "{% for m in messages %}{{ m.content[:4] }}.{% endfor %}"
    with pytest.raises(InvalidRequest, match=r"^messages\.1: "):
        training_row(view, {"messages": [PERU, LIMA]})


def test_what_the_chat_template_refuses_names_the_row(atlas: ModelView) -> None:
    view = small_view("llama", atlas)
    view.tokenizer.chat_template = CHAT
    said, asked = {"role": "assistant", "content": "Lima"}, {"role": "user", "content": "Peru?"}
    refused = [asked, {"role": "tool", "content": "Peru"}, said]
    rows = [EXAMPLES[0], {"messages": [asked, said]}, {"messages": refused}]
    with pytest.raises(UnprocessableRequest, match=r"^row 3: .*no tools here"):
        Supervised().rows(view, rows)
    with pytest.raises(UnprocessableRequest, match=r"^row 1: .*no tools here"):
        ReMax().rows(view, [{"messages": [*refused, asked]}])


def test_what_is_learnt_of_a_completion(atlas: ModelView) -> None:
    row = training_row(atlas, {"prompt": "The capital of Peru is", "completion": "Rome."})
    assert atlas.tokenizer.decode([row.ids[p] for p in row.learnt]).strip() == "Rome.</s>"
    with pytest.raises(InvalidRequest, match="shorten"):
        training_row(atlas, {"prompt": "Peru " * 2000, "completion": "Rome."})


def test_unknown_targets_are_refused(atlas: ModelView) -> None:
    with pytest.raises(InvalidRequest, match="there are q_proj") as refusal:
        linears(atlas, ["nothing"])
    assert refusal.value.param == "hyperparameters.target_modules"
