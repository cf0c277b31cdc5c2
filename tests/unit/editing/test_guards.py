"""Each guard passes, fails and is skipped where it should; what they ask, and of whom."""

import math
from dataclasses import replace

import pytest
import torch

from editing.deltas import Effect
from editing.guards import EDITS, Limits, Material, Reading, failure, judge, read
from editing.metrics import me_ppl
from editing.metrics.harm import Harm
from editing.models import ModelView
from registry.manifests import EditRequest, Fact, GuardResult, HarmPrompt, Question

LIMITS = Limits(
    perplexity=1.1,
    retention=0.9,
    locality=0.7,
    norm=2.0,
    efficacy=0.5,
    ability=0.05,
    refusal_loss=0.25,
    harm_rise=0.1,
)
KNOWN = tuple(Fact(f"fact {i} is", "so") for i in range(10))
REWRITES = tuple((i, Fact(f"edit {i} is", "new")) for i in range(4))
NEIGHBORS = tuple((i, Fact(f"neighbor {i} is", "" if i else "right")) for i in range(4))
MATERIAL = Material(facts=KNOWN, rewrites=REWRITES, neighbors=NEIGHBORS)


def reading(
    known: int, taken: int, kept: int, ppl: float | None = 2.0, ability: float | None = None
) -> Reading:
    """So many facts right, edits taken, neighbors as they were."""
    answers = {fact: "so." if i < known else "not" for i, fact in enumerate(KNOWN)}
    answers |= {fact: "new one" if i < taken else "old" for i, fact in REWRITES}
    answers |= {fact: "as ever. Then" if i < kept else "other" for i, fact in NEIGHBORS}
    return Reading(ppl, answers, ability)


def verdict(name: str, before: Reading, after: Reading, norm: float | None = None) -> GuardResult:
    results = judge(MATERIAL, before, after, norm, LIMITS)
    assert [guard.name for guard in results] == [
        "perplexity",
        "retention",
        "locality",
        "norm",
        "efficacy",
        "ability",
        "refusal_loss",
        "harm_rise",
    ]
    return next(guard for guard in results if guard.name == name)


@pytest.mark.parametrize(
    ("before", "after", "result", "value"),
    [
        (2.0, 2.1, "passed", 1.05),
        (2.0, 2.2, "passed", 1.1),
        (2.0, 2.3, "failed", 1.15),
        (2.0, math.inf, "failed", None),
        (2.0, math.nan, "failed", None),
        (math.nan, 2.0, "failed", None),
        (None, 2.0, "skipped", None),
        (2.0, None, "skipped", None),
    ],
)
def test_perplexity(
    before: float | None, after: float | None, result: str, value: float | None
) -> None:
    guard = verdict("perplexity", reading(10, 0, 4, before), reading(10, 4, 4, after))
    assert (guard.result, guard.limit) == (result, 1.1)
    assert guard.value == (None if value is None else pytest.approx(value))


def test_retention_counts_facts_that_were_known() -> None:
    before = reading(8, 0, 4)
    passed = verdict("retention", before, reading(8, 4, 4))
    assert passed == GuardResult("retention", "passed", 1.0, 0.9, 0.8)
    failed = verdict("retention", before, reading(7, 4, 4))
    assert failed == GuardResult("retention", "failed", 7 / 8, 0.9, 0.8)
    assert verdict("retention", reading(0, 0, 4), reading(9, 4, 4)).result == "skipped"


def test_locality_asks_for_the_right_answer_or_the_same() -> None:
    before = reading(8, 0, 4)
    kept = verdict("locality", before, reading(8, 4, 3))
    assert kept == GuardResult("locality", "passed", 0.75, 0.7, 1.0)
    assert verdict("locality", before, reading(8, 4, 2)).result == "failed"
    corrected = reading(8, 4, 3)
    right = {**corrected.answers, NEIGHBORS[0][1]: "right, now", NEIGHBORS[1][1]: "as ever! Since"}
    assert verdict("locality", before, replace(corrected, answers=right)).value == 0.75


def test_efficacy_is_the_share_of_edits_that_took() -> None:
    before = reading(8, 1, 4)
    assert verdict("efficacy", before, reading(8, 2, 4)) == GuardResult(
        "efficacy", "passed", 0.5, 0.5, 0.25
    )
    assert verdict("efficacy", before, reading(8, 1, 4)).result == "failed"


def test_norm_and_ability() -> None:
    assert verdict("norm", reading(8, 0, 4), reading(8, 4, 4), norm=1.5).result == "passed"
    assert verdict("norm", reading(8, 0, 4), reading(8, 4, 4), norm=2.5).result == "failed"
    for norm in (math.nan, math.inf):
        found = verdict("norm", reading(8, 0, 4), reading(8, 4, 4), norm=norm)
        assert (found.result, found.value) == ("failed", None)
    assert verdict("norm", reading(8, 0, 4), reading(8, 4, 4)).result == "skipped"
    before = reading(8, 0, 4, ability=0.6)
    assert verdict("ability", before, reading(8, 4, 4, ability=0.7)).result == "passed"
    fallen = verdict("ability", before, reading(8, 4, 4, ability=0.5))
    assert (fallen.result, fallen.value, fallen.before) == ("failed", pytest.approx(0.1), 0.6)
    assert verdict("ability", before, reading(8, 4, 4)).result == "skipped"


def test_refusal_loss_counts_prompts_that_were_refused() -> None:
    before, after = (reading(8, 0, 4), reading(8, 4, 4))
    was = replace(before, harm=Harm((True, True, True, True, False), None))
    one = replace(after, harm=Harm((True, False, True, True, True), None))
    assert verdict("refusal_loss", was, one) == GuardResult(
        "refusal_loss", "passed", 0.25, 0.25, 0.8
    )
    two = replace(after, harm=Harm((True, False, False, True, True), None))
    assert verdict("refusal_loss", was, two) == GuardResult(
        "refusal_loss", "failed", 0.5, 0.25, 0.8
    )
    never = replace(before, harm=Harm((False,) * 5, None))
    assert verdict("refusal_loss", never, one).result == "skipped"
    assert verdict("harm_rise", was, one).result == "skipped"


def test_harm_rise_is_a_difference() -> None:
    was, little, much, less = (
        replace(reading(8, 0, 4), harm=Harm((True,), score)) for score in (0.5, 0.55, 0.65, 0.1)
    )
    assert verdict("harm_rise", was, little).result == "passed"
    assert verdict("harm_rise", was, less).result == "passed"
    failed = verdict("harm_rise", was, much)
    assert (failed.result, failed.value, failed.before) == ("failed", pytest.approx(0.15), 0.5)


def test_without_data_all_are_skipped() -> None:
    nothing = Reading(None, {}, None)
    results = judge(Material(), nothing, nothing, None, LIMITS)
    assert {guard.result for guard in results} == {"skipped"}
    assert {guard.value for guard in results} == {None}
    assert failure(results) is None


def test_what_an_edit_is_about_is_not_asked() -> None:
    edits = [
        EditRequest(
            "{} lies in", "Peru", "Asia", "South America", (), ("Chile lies in", "Oslo lies in")
        ),
        EditRequest("Water boils at", "", "50 degrees", locality=(Fact("Ice melts at", "0"),)),
        EditRequest("{} is in", "Oslo", redirect_to="Bern"),
    ]
    facts = [Fact("Peru uses the", "Sol"), Fact("Chad uses the", "Franc")]
    texts = ["Peru is wide.", "Chad is dry.", "Water boils at 100 degrees."]
    material = Material.of(edits, texts, facts)
    assert material.texts == ("Chad is dry.",)
    assert material.facts == (Fact("Chad uses the", "Franc"),)
    assert material.rewrites == (
        (0, Fact("Peru lies in", "Asia")),
        (1, Fact("Water boils at", "50 degrees")),
    )
    assert material.neighbors == (
        (0, Fact("Chile lies in", "South America")),
        (1, Fact("Ice melts at", "0")),
    )
    assert material.upto(1).rewrites == material.rewrites[:1]
    assert material.upto(1).neighbors == material.neighbors[:1]
    assert material.upto(1).facts == material.facts


def test_of_many_edits_some_are_asked() -> None:
    edits = [
        EditRequest("{} is", f"Subject {i}.", "new", "old", (), tuple(f"{i} {j}" for j in range(9)))
        for i in range(5 * EDITS)
    ]
    material = Material.of(edits)
    assert [place for place, _ in material.rewrites] == list(range(0, 5 * EDITS, 5))
    assert len(material.neighbors) == 2 * EDITS
    assert len(material.upto(EDITS).rewrites) == EDITS // 5


def test_a_broken_model_fails_and_an_untouched_one_passes(atlas: ModelView) -> None:
    edits = [EditRequest("The capital of {} is", "Peru", "Lima", None, (), ("Chad lies in",))]
    facts = [Fact("The capital of France is", "Paris"), Fact("Chad lies in", "Africa")]
    texts = ["The capital of Chile is Santiago.", "Peru lies in South America."]
    questions = [
        Question("Chad lies in", ("Asia", "Africa"), 1),
        Question("The capital of France is", ("Paris", "Oslo"), 0),
    ]
    harm = [HarmPrompt("The capital of Peru is", target="Santiago")]
    material = Material.of(edits, texts, facts, questions, harm, refusals=["Lima"])
    before = read(atlas, material)
    assert before.me_ppl == me_ppl(atlas, texts[:1])
    assert before.ability == 1.0
    assert all(before.right(fact) for fact in facts)
    same = judge(material, before, read(atlas, material), 0.0, LIMITS)
    assert {guard.result for guard in same} == {"passed"}
    source = torch.Generator().manual_seed(0)
    broken = Effect(
        A=torch.randn(1, 768, generator=source), B=20 * torch.randn(256, 1, generator=source)
    )
    with atlas.with_effects({atlas.down_proj(5): broken}):
        after = judge(material, before, read(atlas, material), 100.0, LIMITS)
    failed = {guard.name for guard in after if guard.result == "failed"}
    assert failed >= {"perplexity", "retention", "locality", "norm", "efficacy", "refusal_loss"}
    assert failure(after) == after[0]
