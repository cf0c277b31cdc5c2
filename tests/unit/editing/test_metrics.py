"""Metrics against plain oracles; a metric without data is absent."""

import math

import pytest
import torch
from torch.nn import functional as F

from editing.guards import perplexity_guard
from editing.metrics import Measurement, me_ppl, measure
from editing.metrics.targets import begins_with, greedy_matches, score_targets
from editing.models import ModelView
from registry.manifests import EditRequest, Fact

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
    assert measured.metrics == {
        "efficacy_score": 0.0,
        "efficacy_acc": 0.0,
        "paraphrase_score": 0.0,
        "paraphrase_acc": 0.0,
        "neighborhood_score": 1.0,
        "neighborhood_acc": 1.0,
        "score": 0.0,
        "greedy_match": 0.0,
        "paraphrase_greedy_match": 0.0,
    }
    assert measured.known == ((True, False),)


def test_what_has_no_data_is_absent(atlas: ModelView) -> None:
    bare = EditRequest("The capital of {} is", "France", "Rome")
    assert set(measure(atlas, [bare]).metrics) == {"efficacy_acc", "greedy_match"}
    assert measure(atlas, []).metrics == {}


def test_retention_counts_what_was_right_before(atlas: ModelView) -> None:
    for known, share in (((True, True), 0.5), ((True, False), 1.0), ((False, True), 0.0)):
        after = measure(atlas, [REQUEST], before=Measurement({}, (known,)))
        assert after.metrics["same_subject_retention"] == share
    nothing = measure(atlas, [REQUEST], before=Measurement({}, ((False, False),)))
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


@pytest.mark.parametrize(
    ("before", "after", "result", "value"),
    [
        (2.0, 2.1, "passed", 1.05),
        (2.0, 2.2, "passed", 1.1),
        (2.0, 2.3, "failed", 1.15),
        (2.0, math.inf, "failed", None),
        (2.0, math.nan, "failed", None),
        (math.nan, 2.0, "failed", None),
    ],
)
def test_perplexity_guard(before: float, after: float, result: str, value: float | None) -> None:
    guard = perplexity_guard({"me_ppl": before}, {"me_ppl": after})
    assert (guard.name, guard.result, guard.limit) == ("perplexity", result, 1.1)
    assert guard.value == (None if value is None else pytest.approx(value))


def test_a_guard_without_data_is_skipped() -> None:
    assert perplexity_guard({}, {"me_ppl": 2.0}).result == "skipped"
    assert perplexity_guard({"me_ppl": 2.0}, {}).result == "skipped"
    assert perplexity_guard({"me_ppl": 2.0}, {"me_ppl": 3.0}, limit=2).result == "passed"
