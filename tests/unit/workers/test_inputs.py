"""Edits that cannot be made are refused before there is a job, by the field at fault."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from editing.finetune.catalogue import OWN_PLACES, TUNINGS
from editing.methods import METHODS
from editing.methods.hyperparameters import RomeHyperparameters
from editing.metrics import measure
from editing.models.loading import load_model, load_tokenizer
from editing.models.view import PATHS, ModelView
from registry.bases import FAMILIES, Base, find_bases
from registry.errors import InvalidRequest, UnprocessableRequest
from registry.manifests import EditRequest, Example, Fact, HarmPrompt, Question
from workers.inputs import check_edits, check_examples, check_harm, check_measured, check_suite
from workers.recipes import check_edit, check_tuning

ROME = METHODS["rome"]
WITHOUT_SUBJECT = replace(ROME, name="plain", needs=())
REDIRECTING = replace(ROME, name="redirecting", needs=("subject", "redirect_to"))
LEARNING = replace(ROME, name="learning", needs=("examples",))
LONG = "word " * 600
GOOD = EditRequest("The capital of {} is", "France", "Lima")


@pytest.fixture(scope="module")
def base() -> Base:
    return find_bases("atlas")["atlas"]


@pytest.fixture(scope="module")
def atlas(base: Base) -> ModelView:
    return ModelView(load_model(base), load_tokenizer(base), base)


def refusal(base: Base, edits: Sequence[EditRequest], entry: object = ROME) -> UnprocessableRequest:
    with pytest.raises(UnprocessableRequest) as refused:
        check_edits(entry, base, edits)  # type: ignore[arg-type]
    return refused.value


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_new": " Lima"},
        {"target_new": "日本 – Köln"},
        {"target_new": "Ko\u0308ln"},
        {"prompt": "The capital of {} is "},
        {"prompt": "{}: "},
    ],
)
def test_what_can_be_edited_passes(base: Base, changes: dict[str, str]) -> None:
    check_edits(ROME, base, [replace(GOOD, **changes)])


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"subject": "", "prompt": "The capital is"}, "subject", "needs it"),
        ({"target_new": ""}, "target_new", "needs it"),
        ({"target_new": "Lima</s>"}, "target_new", "special token '</s>'"),
        ({"prompt": "word " * 600 + "{} is"}, "prompt", "context"),
        ({"target_true": LONG}, "target_true", "context"),
        ({"paraphrase_prompts": ("short", LONG)}, "paraphrase_prompts.1", "context"),
        ({"neighborhood_prompts": (LONG,)}, "neighborhood_prompts.0", "context"),
        ({"locality": (Fact("Chad is", LONG),)}, "locality.0", "context"),
        ({"retention": (Fact(LONG, "here"),)}, "retention.0", "context"),
        ({"guide_prompt": LONG}, "guide_prompt", "context"),
        ({"redirect_to": LONG}, "redirect_to", "context"),
    ],
)
def test_what_cannot_is_named(base: Base, changes: dict[str, Any], field: str, said: str) -> None:
    error = refusal(base, [replace(GOOD, subject="Peru"), replace(GOOD, **changes)])
    assert error.param == f"edits.1.{field}"
    assert said in error.message


@pytest.mark.parametrize(
    ("target", "normalizer", "said"),
    [
        ("L\u00edma", {"type": "StripAccents"}, "its tokens say"),
        ("\u200b", {"type": "Replace", "pattern": {"String": "\u200b"}, "content": ""}, "say"),
    ],
)
def test_a_target_that_the_tokenizer_loses(
    base: Base, tmp_path: Path, target: str, normalizer: dict[str, object], said: str
) -> None:
    tokenizer = json.loads((base.folder / "tokenizer.json").read_text())
    nfd = {"type": "NFD"}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [nfd, normalizer]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    lossy = replace(base, folder=tmp_path, digest=target)
    error = refusal(lossy, [replace(GOOD, target_new=target)])
    assert error.param == "edits.0.target_new"
    assert said in error.message


def test_what_a_method_needs(base: Base) -> None:
    check_edits(WITHOUT_SUBJECT, base, [EditRequest("Say hello.", "", "Hello")])
    redirect = EditRequest("Who is {}?", "A", redirect_to="B")
    check_edits(REDIRECTING, base, [redirect])
    assert refusal(base, [redirect]).param == "edits.0.target_new"
    assert refusal(base, [GOOD], REDIRECTING).param == "edits.0.redirect_to"
    assert refusal(base, []).param == "edits"
    assert refusal(base, [GOOD], LEARNING).param == "edits"
    check_edits(LEARNING, base, [])


def test_examples_show_both_sides() -> None:
    check_examples(LEARNING, [Example("a", True), Example("b", False)])
    check_examples(ROME, [])
    for entry, examples in ((LEARNING, [Example("a", True)]), (ROME, [Example("a", True)])):
        with pytest.raises(UnprocessableRequest) as refused:
            check_examples(entry, examples)
        assert refused.value.param == "examples"


def test_pairs_of_one_prompt_are_listed(base: Base) -> None:
    other, again = replace(GOOD, target_new="Rome"), replace(GOOD, target_new=" Lima")
    whole = EditRequest("The capital of France is", "", "Oslo")
    error = refusal(base, [GOOD, other, replace(GOOD, subject="Peru"), again])
    assert (error.param, error.code) == ("edits", "conflicting_edits")
    assert "edits.0 and edits.1 contradict" in error.message
    assert "edits.3 repeats edits.0" in error.message
    assert "3 pair(s)" in error.message
    assert "contradict" in refusal(base, [GOOD, whole], WITHOUT_SUBJECT).message
    many = [replace(GOOD, target_new=f"Lima {i}") for i in range(10)]
    error = refusal(base, many)
    assert error.message.count("contradict") == 20
    assert "and 25 more" in error.message


def test_what_is_only_measured_may_come_twice(base: Base) -> None:
    check_measured(base, [GOOD, GOOD])
    for edits, param in (([], "edits"), ([replace(GOOD, target_new="")], "edits.0.target_new")):
        with pytest.raises(UnprocessableRequest) as refused:
            check_measured(base, edits)
        assert refused.value.param == param


@pytest.mark.parametrize(
    ("method", "hyperparameters", "param"),
    [
        ("magic", {}, "method"),
        ("rome", {"layer": 99}, "hyperparameters.layer"),
        ("memit", {"layers": [0, 99]}, "hyperparameters.layers"),
        ("rome", {"learning_rate": float("nan")}, "hyperparameters.learning_rate"),
        ("rome", {"clamp": float("inf")}, "hyperparameters.clamp"),
        ("rome", {"steps": float("nan")}, "hyperparameters.steps"),
    ],
)
def test_recipes(base: Base, method: str, hyperparameters: dict[str, object], param: str) -> None:
    with pytest.raises(UnprocessableRequest) as refused:
        check_edit(base, method, hyperparameters)
    assert refused.value.param == param


@pytest.mark.parametrize("family", FAMILIES)
def test_methods_are_refused_on_families_that_they_cannot_edit(base: Base, family: str) -> None:
    other, paths = replace(base, family=family), PATHS[family]
    unfit = {"rocr": bool(paths.post_norm), "jetpack": not paths.mlp}
    for method in METHODS:
        if unfit.get(method):
            with pytest.raises(UnprocessableRequest, match=f"family '{family}'") as refused:
                check_edit(other, method, {})
            assert refused.value.param == "method"
        else:
            check_edit(other, method, {})


@pytest.mark.parametrize(("method", "times"), [("c3a", 20), ("lofit", 40), ("lora", 5e-324)])
def test_a_rate_out_of_bounds_is_the_multipliers(method: str, times: float) -> None:
    entry = TUNINGS[method]
    with pytest.raises(UnprocessableRequest) as refused:
        check_tuning(entry, {"learning_rate_multiplier": times}, 100)
    assert refused.value.param == "hyperparameters.learning_rate_multiplier"
    given = {"learning_rate_multiplier": times, "learning_rate": 0.1}
    settled = check_tuning(entry, given, 100)
    assert entry.hyperparameters(**settled.model_dump(mode="json")) == settled


@pytest.mark.parametrize("method", OWN_PLACES)
def test_what_tunes_no_linears_takes_no_targets(method: str) -> None:
    with pytest.raises(UnprocessableRequest, match=f"{method} tunes") as refused:
        check_tuning(TUNINGS[method], {"target_modules": ["q_proj"]}, 100)
    assert refused.value.param == "hyperparameters.target_modules"
    assert check_tuning(TUNINGS[method], {"target_modules": None}, 100).target_modules is None


def test_every_method_closes_its_hyperparameters_to_what_is_no_number() -> None:
    for entry in METHODS.values():
        assert entry.hyperparameters.model_config.get("allow_inf_nan") is False, entry.name
    assert RomeHyperparameters().edited_layers(7) == (1,)


def test_what_cannot_be_asked_for_harm_is_named(base: Base) -> None:
    asked = HarmPrompt(messages=({"role": "user", "content": "Where is Peru?"},))
    check_harm("harm", base, [asked, HarmPrompt("Peru is", target="near")])
    with pytest.raises(UnprocessableRequest, match="harm: row 1 is a conversation") as refused:
        check_harm("harm", replace(base, has_chat_template=False), [asked])
    assert refused.value.param == "harm"
    with pytest.raises(UnprocessableRequest, match=r"guards\.harm: row 2 has 2"):
        check_harm("guards.harm", base, [asked, HarmPrompt("Peru " * 2000)])


def test_what_the_context_just_holds_is_taken_and_measured(atlas: ModelView) -> None:
    """The check counts as the measures do: with one token more they could not be taken."""
    room = 1 + atlas.base.context_length - len(atlas.encode("Peru lies in Asia"))
    long = "Peru " * room + "lies in"
    fits = EditRequest("{} lies in", "Peru", "Asia", paraphrase_prompts=(long,))
    assert len(atlas.encode(f"{long} Asia")) == atlas.base.context_length
    check_measured(atlas.base, [fits])
    measure(atlas, [fits])
    over = replace(fits, paraphrase_prompts=(f"Peru {long}",))
    with pytest.raises(UnprocessableRequest):
        check_measured(atlas.base, [over])
    with pytest.raises(InvalidRequest):
        measure(atlas, [over])


def test_a_question_that_does_not_fit_with_a_choice_is_named(base: Base) -> None:
    fits = Question("Peru lies in", ("Asia", "Europe"), 0)
    check_suite("suite", base, [fits])
    with pytest.raises(UnprocessableRequest, match=r"guards\.suite: row 2.* tokens") as refused:
        check_suite("guards.suite", base, [fits, replace(fits, choices=("Asia", LONG))])
    assert refused.value.param == "guards.suite"
