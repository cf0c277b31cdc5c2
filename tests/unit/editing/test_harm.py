"""What counts as a refusal, and the probability of harmful answers."""

import math
from dataclasses import replace

import pytest
import torch

from editing.finetune.rows import training_row
from editing.metrics.harm import measure_harm, refuses
from editing.models import ModelView
from registry.errors import InvalidRequest
from registry.manifests import HarmPrompt
from tests.unit.editing.conftest import small_view

PERU = HarmPrompt("The capital of Peru is", target="Lima")
CHAD = HarmPrompt("The capital of Chad is")
ASKED = HarmPrompt(
    messages=({"role": "user", "content": "Where does Chad lie?"},), target="In Africa."
)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("I'm sorry, I do not know.", True),
        ("I\u2019m sorry.", True),
        ("That is bad. As an ai, I would not.", True),
        ("I cannot.", True),
        ("Cannot I?", False),
        ("Sure, here is how. I cannotes.", False),
        ("", False),
    ],
)
def test_refuses(answer: str, expected: bool) -> None:
    assert refuses(answer) is expected


def test_own_phrases_take_the_place_of_the_common_ones() -> None:
    assert refuses("Lima is the capital", ["lima"])
    assert not refuses("I'm sorry", ["lima"])


def probability(view: ModelView, ids: list[int], learnt: list[int]) -> float:
    """P(y | x)^(1/|y|) by the formula, in double precision."""
    with torch.no_grad():
        logits = view.logits(view.hidden(torch.tensor([ids])))[0].double()
    logs = logits.log_softmax(-1)
    return math.exp(sum(float(logs[at - 1, ids[at]]) for at in learnt) / len(learnt))


def test_the_score_is_the_mean_of_normalised_probabilities(atlas: ModelView) -> None:
    before, after = atlas.continuation(PERU.prompt, PERU.target)
    plain = probability(
        atlas, [*before, *after], list(range(len(before), len(before) + len(after)))
    )
    turns = [*ASKED.messages, {"role": "assistant", "content": ASKED.target}]
    row = training_row(atlas, {"messages": turns})
    asked = probability(atlas, list(row.ids), list(row.learnt)[:-1])  # no end token
    harm = measure_harm(atlas, [PERU, CHAD, ASKED])
    assert harm is not None
    assert harm.score == pytest.approx((plain + asked) / 2, rel=1e-4)
    assert 0 < harm.score < 1


def test_a_conversation_that_the_chat_template_refuses_is_named(atlas: ModelView) -> None:
    view = small_view("llama", atlas)
    view.tokenizer.chat_template = "{{ raise_exception('no chat') }}"
    chats = replace(view, base=replace(view.base, has_chat_template=True))
    with pytest.raises(InvalidRequest, match=r"^harm prompt 2: .*no chat"):
        measure_harm(chats, [PERU, ASKED])


def test_the_rate_is_of_greedy_answers(atlas: ModelView) -> None:
    harm = measure_harm(atlas, [PERU, CHAD], ["LIMA"])
    assert harm is not None
    assert (harm.refused, harm.refusal_rate) == ((True, False), 0.5)
    assert harm.metrics.keys() == {"refusal_rate", "harm_score"}


def test_without_targets_there_is_no_score(atlas: ModelView) -> None:
    harm = measure_harm(atlas, [CHAD])
    assert harm is not None
    assert harm.metrics == {"refusal_rate": 0.0}
    assert measure_harm(atlas, []) is None


def test_what_cannot_be_asked_is_refused(atlas: ModelView) -> None:
    silent = replace(atlas, base=replace(atlas.base, has_chat_template=False))
    with pytest.raises(InvalidRequest, match="harm prompt 2 is a conversation"):
        measure_harm(silent, [PERU, ASKED])
    long = HarmPrompt("Peru " * atlas.base.context_length)
    with pytest.raises(InvalidRequest, match=r"harm prompt 1 .* leaves no room"):
        measure_harm(atlas, [long])
