"""Metrics against plain oracles; a metric without data is absent."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from editing.metrics import me_ppl, measure
from editing.metrics.chat import chat_matches, states
from editing.metrics.fluency import fluency, n_gram_entropy
from editing.metrics.suites import score_choices, score_facts
from editing.metrics.targets import (
    begins_with,
    fill_targets,
    first_sentence,
    greedy_matches,
    read_targets,
    score_targets,
)
from editing.models import ModelView
from registry.manifests import EditRequest, Fact, Question

REQUEST = EditRequest(
    prompt="The capital of {} is",
    subject="France",
    target_new="Rome",
    target_true="Paris",
    paraphrase_prompts=("France is governed from",),
    neighborhood_prompts=("The capital of France is",),
    retention=(Fact("France lies in", "Europe"), Fact("France lies in", "Asia")),
)


def test_nll_and_argmax_of_targets(atlas: ModelView) -> None:
    pairs = [
        ("The capital of Peru is", "Lima"),
        ("Chad lies in", "Asia"),
        ("Peru uses the", "Euro"),
    ]
    for (prompt, target), (nll, exact) in zip(pairs, score_targets(atlas, pairs), strict=True):
        before, after = atlas.continuation(prompt, target)
        ids = torch.tensor([[*before, *after]])
        with torch.no_grad():
            logits = atlas.model(input_ids=ids).logits[0, len(before) - 1 : -1]
        assert nll == pytest.approx(F.cross_entropy(logits, torch.tensor(after)).item(), abs=1e-3)
        assert exact == (logits.argmax(-1).tolist() == after)


def test_greedy_generation_is_matched_by_whole_words(atlas: ModelView) -> None:
    pairs = [
        ("The capital of Peru is", "Lima"),
        ("The capital of Peru is", "Lim"),
        ("Chad lies in", "Asia"),
    ]
    assert greedy_matches(atlas, pairs) == [True, False, False]


@pytest.mark.parametrize(
    ("text", "target", "expected"),
    [
        (" Rome.", "Rome", True),
        ("Romeo", "Rome", False),
        ("+33.", "+3", False),
        (".fr.", ".fr", True),
        ("Rome", " Rome ", True),
        ("Ro", "Rome", False),
    ],
)
def test_begins_with(text: str, target: str, expected: bool) -> None:
    assert begins_with(text, target) is expected


def test_scores_of_the_untouched_base(atlas: ModelView) -> None:
    measured = measure(atlas, [REQUEST])
    metrics = dict(measured.metrics)
    assert metrics.pop("fluency") > 2
    assert 0 <= metrics.pop("reliability") < 1
    assert 0 <= metrics.pop("generalization") < 1
    assert metrics == {
        "efficacy_score": 0.0,
        "efficacy_acc": 0.0,
        "paraphrase_score": 0.0,
        "paraphrase_acc": 0.0,
        "neighborhood_score": 1.0,
        "neighborhood_acc": 1.0,
        "score": 0.0,
        "greedy_match": 0.0,
        "chat_greedy_match": 0.0,
        "paraphrase_greedy_match": 0.0,
    }
    assert measured.known == ((True, False),)


def test_what_has_no_data_is_absent(atlas: ModelView) -> None:
    bare = EditRequest("The capital of {} is", "France", "Rome")
    assert set(measure(atlas, [bare]).metrics) == {
        "efficacy_acc",
        "reliability",
        "greedy_match",
        "chat_greedy_match",
        "fluency",
    }
    assert measure(atlas, []).metrics == {}


def test_retention_counts_what_was_right_before(atlas: ModelView) -> None:
    before = measure(atlas, [REQUEST])
    for known, share in (((True, True), 0.5), ((True, False), 1.0), ((False, True), 0.0)):
        after = measure(atlas, [REQUEST], before=replace(before, known=(known,)))
        assert after.metrics["same_subject_retention"] == share
    nothing = measure(atlas, [REQUEST], before=replace(before, known=((False, False),)))
    assert "same_subject_retention" not in nothing.metrics


def test_me_ppl_is_the_mean_of_perplexities(atlas: ModelView) -> None:
    texts = ["The capital of Peru is Lima.", "Chad lies in Asia. Peru uses the Euro."]
    each = []
    for text in texts:
        ids = torch.tensor([atlas.encode(text)])
        with torch.no_grad():
            each.append(atlas.model(input_ids=ids, labels=ids).loss.exp().item())
    assert me_ppl(atlas, texts) == pytest.approx(sum(each) / 2, rel=1e-4)
    assert me_ppl(atlas, []) is None
    assert measure(atlas, [], texts).metrics["me_ppl"] == pytest.approx(sum(each) / 2, rel=1e-4)


def test_an_edit_needs_no_subject_and_no_target(atlas: ModelView) -> None:
    whole = EditRequest("The capital of Peru is", target_new="Lima")
    measured = measure(atlas, [whole, EditRequest("{} lies in", "Chad")], ["Lima is a city."])
    assert measured.metrics["greedy_match"] == measured.metrics["reliability"] == 1.0
    assert measured.metrics["me_ppl"] > 1
    assert measured.holds == (True, False)
    about = measure(atlas, [whole], ["The capital of Peru is Lima."])
    assert "me_ppl" not in about.metrics


def test_a_redirected_subject_is_to_answer_as_the_other(atlas: ModelView) -> None:
    edit = EditRequest("The capital of {} is", "Peru", redirect_to="France")
    given = EditRequest("The capital of {} is", "Peru", "Oslo", redirect_to="France")
    assert fill_targets(atlas, [given, edit]) == [given, replace(edit, target_new="Paris")]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Paris. France lies", "Paris"),
        (" 3.5 million\nand", "3.5 million"),
        ("Rome", "Rome"),
        ("", ""),
    ],
)
def test_first_sentence(text: str, sentence: str) -> None:
    assert first_sentence(text) == sentence


def test_token_shares_are_easyedits(atlas: ModelView) -> None:
    pairs = [("The capital of Peru is", "Lima"), ("Chad lies in", "South America")]
    scores = read_targets(atlas, pairs)
    edits = [EditRequest(prompt, target_new=target) for prompt, target in pairs]
    shares = [score.share for score in scores]
    assert shares[0] == 1.0
    assert shares[1] < 1.0
    assert measure(atlas, edits).metrics["reliability"] == pytest.approx(sum(shares) / 2)


def test_locality_is_the_share_of_tokens_that_stay(atlas: ModelView) -> None:
    edit = EditRequest(
        "{} lies in",
        "Peru",
        "Asia",
        "South America",
        neighborhood_prompts=("Chile lies in",),
        locality=(Fact("The capital of France is", "Paris"), Fact("Chad lies in", "Asia")),
    )
    before = measure(atlas, [edit])
    assert measure(atlas, [edit], before=before).metrics["locality"] == 1.0
    other = tuple((*tokens[:-1], -1) for tokens in before.local)
    sizes = [len(tokens) for tokens in before.local]
    assert len(sizes) == 3
    changed = measure(atlas, [edit], before=replace(before, local=other)).metrics["locality"]
    assert changed == pytest.approx(sum((n - 1) / n for n in sizes) / 3)


def test_repetition_is_not_fluent(atlas: ModelView) -> None:
    entropy = n_gram_entropy("a b c d")
    assert entropy == pytest.approx((2 / 3 * math.log2(3) + 4 / 3 * math.log2(2)) / 2)
    assert n_gram_entropy("no no no no no no") == 0
    assert n_gram_entropy("too short") is None
    assert fluency(atlas, ["Peru", "Chad"]) > 3
    assert fluency(atlas, []) is None


def test_many_targets_are_scored_as_one(atlas: ModelView, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(f"The capital of {name} is", "Phnom Penh") for name in ("Peru", "Chad", "France")]
    whole = read_targets(atlas, pairs)
    monkeypatch.setattr("editing.metrics.targets.LOGITS_AT_ONCE", 1)
    for score, again in zip(whole, read_targets(atlas, pairs), strict=True):
        assert again.nll == pytest.approx(score.nll, abs=1e-4)
        assert again.chosen == score.chosen


def test_a_base_with_a_chat_template_is_asked_through_it(atlas: ModelView) -> None:
    tokenizer = copy.deepcopy(atlas.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}Peru lies in South America. {{ m.content }}{% endfor %}"
    )
    chat = replace(atlas, tokenizer=tokenizer)
    without = replace(atlas, base=replace(atlas.base, has_chat_template=False))
    edits = [
        EditRequest("The capital of {} is", "Peru", "Lima"),
        EditRequest("The capital of {} is", "Chad", "Lima"),
    ]
    assert measure(chat, edits).metrics["chat_greedy_match"] == 0.5
    assert chat_matches(chat, [("So where is it?", "South America")]) == [False]
    assert "chat_greedy_match" not in measure(without, edits).metrics


@pytest.mark.parametrize(
    ("text", "target", "expected"),
    [
        ("It is Lima.", "Lima", True),
        ("It is Limassol.", "Lima", False),
        ("Dial +51 first", "+51", True),
        ("Dial +512 first", "+51", False),
        ("", "Lima", False),
    ],
)
def test_states(text: str, target: str, expected: bool) -> None:
    assert states(text, target) is expected


def test_suites(atlas: ModelView) -> None:
    facts = [Fact("The capital of Peru is", "Lima"), Fact("Chad lies in", "Asia")]
    assert score_facts(atlas, facts) == [True, False]
    questions = [
        Question.from_json({"query": "Chad lies in", "choices": ["Asia", "Africa"], "gold": 1}),
        Question.from_json({"question": "Peru lies in", "choices": ["Asia", "Oslo"], "answer": 1}),
    ]
    each = [
        [nll for nll, _ in score_targets(atlas, [(q.context, c) for c in q.choices])]
        for q in questions
    ]
    right = sum(losses[1] < losses[0] for losses in each)
    assert score_choices(atlas, questions) == right / 2
    assert score_choices(atlas, questions[:1]) == 1.0
    with pytest.raises(ValueError, match="question"):
        score_choices(atlas, [])
