"""The descent on values: its losses are the edited model's, alone and in a batch."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from editing.deltas import Effect
from editing.methods.hyperparameters import ValueHyperparameters
from editing.methods.values import Goal, Watched, _Batch, at_token, by_key, keep, optimise, say
from editing.models import ModelView
from tests.unit.editing.conftest import FFN, HIDDEN, small_view


class Descent(ValueHyperparameters):
    def edited_layers(self, depth: int) -> tuple[int, ...]:
        return (1,)


ASKED = {
    "France": ("The capital of France is", "Rome"),
    "Peru": ("Peru lies in", "Asia"),
    "Burkina Faso": ("The official language of Burkina Faso is", "Dutch"),
}
KEPT = ["France lies in Europe.", "Peru uses the Sol.", "Burkina Faso borders Mali."]


def goals(view: ModelView) -> list[Goal]:
    made = []
    for (subject, (prompt, target)), text in zip(ASKED.items(), KEPT, strict=True):
        longer = f"Some say this. {prompt}"
        said = at_token(view, [say(view, p, target, subject) for p in (prompt, longer)])
        kept = at_token(view, keep(view, subject, [text]))
        made.append(Goal(subject, said, kept, [], 1.0))
    return made


def log_probabilities(view: ModelView, text: Watched) -> torch.Tensor:
    hidden = view.hidden(view.pad([text.ids]))[0, list(text.watched)]
    return view.logits(hidden).log_softmax(-1)


def test_a_rank_one_effects_losses_are_the_edited_models(small: ModelView) -> None:
    source = torch.Generator().manual_seed(0)
    a, delta = torch.randn(FFN, generator=source), torch.randn(HIDDEN, generator=source) * 0.3
    prompt, target = ASKED["France"]
    said, kept = say(small, prompt, target), keep(small, "France", KEPT[:1])
    goal = Goal("France", by_key(small, 1, a, [said]), by_key(small, 1, a, kept), [], 1.0)
    batch = _Batch(small, 1, [goal], [0])
    spoken, texts = delta[None].clone().requires_grad_(), delta[None].clone().requires_grad_()
    largest = batch.nll(spoken)
    batch.kl(texts, 0, 1.0)

    d = delta.clone().requires_grad_()
    effect = Effect(A=a[None], B=d[:, None])
    with torch.no_grad():
        before = log_probabilities(small, kept[0])
    path = small.down_proj(1)
    hook = small.module(path).register_forward_hook(lambda _, x, y: effect.apply(x[0], y))
    after, new = log_probabilities(small, kept[0]), log_probabilities(small, said)
    hook.remove()
    ids, watched = said.ids, said.watched
    nll = -new[torch.arange(len(watched)), torch.tensor(ids)[watched.start + 1 : watched.stop + 1]]
    kl = (before.exp() * (before - after)).sum()
    assert_close(largest, nll.max()[None], rtol=1e-3, atol=1e-3)
    (expected,) = torch.autograd.grad(nll.mean(), d, retain_graph=True)
    assert_close(spoken.grad[0], expected, rtol=1e-2, atol=1e-3)
    (expected,) = torch.autograd.grad(kl, d)
    assert_close(texts.grad[0], expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma2"])
def test_a_batch_finds_what_each_edit_finds_alone(atlas: ModelView, name: str) -> None:
    view = small_view(name, atlas)
    descent = Descent(steps=12, learning_rate=0.5, stop_loss=6.0, clamp=30)
    made = goals(view)
    together = last(optimise(view, 1, made, descent))
    alone = [last(optimise(view, 1, [goal], descent)) for goal in made]
    assert together.steps == [one.steps[0] for one in alone]
    assert_close(together.deltas, torch.cat([one.deltas for one in alone]), rtol=1e-2, atol=1e-2)
    assert_close(together.losses, torch.cat([one.losses for one in alone]), rtol=1e-2, atol=1e-2)


def test_an_edit_leaves_once_it_holds_and_no_value_passes_the_clamp(atlas: ModelView) -> None:
    view = small_view("llama", atlas)
    made = goals(view)
    easy = replace(made[1], said=made[1].said[:1])
    start = _Batch(view, 1, [easy], [0]).nll(torch.zeros(1, HIDDEN, requires_grad=True))
    descent = Descent(steps=6, learning_rate=1.0, stop_loss=float(start) + 0.1, clamp=0.5)
    steps = list(optimise(view, 1, [easy], descent))
    assert len(steps) == 1
    assert steps[0].done == steps[0].total == 6
    descent = Descent(steps=6, learning_rate=1.0, stop_loss=1e-9, clamp=0.5)
    found = last(optimise(view, 1, made, descent))
    assert found.steps == [6, 6, 6]
    assert float(found.deltas.norm(dim=1).max()) <= 0.5 + 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma2", "phi"])
def test_edits_that_leave_the_batch_leave_the_others_as_they_are(
    atlas: ModelView, name: str
) -> None:
    view = small_view(name, atlas)
    made = goals(view)
    batch, fresh = _Batch(view, 1, made, range(3)), _Batch(view, 1, made, [0, 2])
    source = torch.Generator().manual_seed(5)
    deltas = torch.randn(3, HIDDEN, generator=source) * 0.3
    batch.kl(deltas.clone().requires_grad_(), 0, 1.0)  # what is to be kept is ready now
    batch.keep([0, 2])
    for batch_, found in ((batch, []), (fresh, [])):
        spoken, texts = (deltas.clone().requires_grad_() for _ in range(2))
        found += [batch_.nll(spoken), spoken.grad]
        batch_.kl(texts, 0, 1.0)
        found.append(texts.grad)
        if batch_ is batch:
            kept = found
    for one, other in zip(kept, found, strict=True):
        assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert not bool(kept[1][1].any())


def test_what_is_about_to_state_the_fact_is_not_kept(atlas: ModelView) -> None:
    prompt, _ = ASKED["France"]
    ids, answer = atlas.continuation(prompt, "Paris")
    end = len(ids) - 1
    (text,) = at_token(atlas, [Watched([*ids, *answer], range(end - 1, end + 1), [end - 1])])
    watching = {}
    for answers in ((), (answer[0],)):
        batch = _Batch(atlas, 1, [Goal("France", [text], [text], answers, 1.0)], [0])
        (chunk,) = batch._chunks_to_keep(0)
        watching[answers] = len(chunk.before)
        assert len(chunk.owners) == len(chunk.before)
    assert watching == {(): 2, (answer[0],): 1}


def last(work):
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value
