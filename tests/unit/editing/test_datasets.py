"""Edits are read from the three published forms; a row that is none of them is named."""

import json

import pytest

from editing.atlas.evaluation import CASES_FILE, SHIPPED
from editing.datasets import read_edits
from registry.errors import InvalidRequest
from registry.manifests import EditRequest, Fact


def test_own_form() -> None:
    row = {
        "prompt": "The capital of {} is",
        "subject": "France",
        "target_new": "Rome",
        "retention": [{"prompt": "France lies in", "target": "Europe"}],
    }
    retention = (Fact("France lies in", "Europe"),)
    assert read_edits([row]) == [
        EditRequest("The capital of {} is", "France", "Rome", retention=retention)
    ]
    assert len(read_edits(json.loads(CASES_FILE.read_text()))) == SHIPPED


def test_counterfact() -> None:
    row = {
        "case_id": 0,
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "subject": "Danielle Darrieux",
            "target_new": {"str": "English", "id": "Q1860"},
            "target_true": {"str": "French", "id": "Q150"},
        },
        "paraphrase_prompts": ["Danielle Darrieux, a native"],
        "neighborhood_prompts": ["The native language of Montesquieu is"],
    }
    assert read_edits([row]) == [
        EditRequest(
            "The mother tongue of {} is",
            "Danielle Darrieux",
            "English",
            "French",
            ("Danielle Darrieux, a native",),
            ("The native language of Montesquieu is",),
        )
    ]


def test_flat_form() -> None:
    row = {
        "prompt": "The capital of France is",
        "subject": "France",
        "target_new": "Rome",
        "ground_truth": "Paris",
        "rephrase_prompt": "France is governed from",
        "locality_prompt": "Peru lies in",
        "locality_ground_truth": "South America",
    }
    (request,) = read_edits([row])
    assert request.prompt == "The capital of {} is"
    assert request.target_true == "Paris"
    assert request.paraphrase_prompts == ("France is governed from",)
    assert request.neighborhood_prompts == ()


@pytest.mark.parametrize(
    ("row", "param"),
    [
        ("text", "edits.0"),
        ({"subject": "France"}, "edits.0.prompt"),
        ({"prompt": "{} is", "subject": 3}, "edits.0.subject"),
        ({"prompt": "{} is", "subject": "France"}, "edits.0.target_new"),
        ({"prompt": "Peru is", "subject": "France", "target_new": "x"}, "edits.0.prompt"),
        (
            {"prompt": "{}", "subject": "a", "target_new": "b", "paraphrase_prompts": "c"},
            "edits.0.paraphrase_prompts",
        ),
        (
            {"requested_rewrite": {"prompt": "{}", "subject": "a"}},
            "edits.0.requested_rewrite.target_new",
        ),
    ],
)
def test_a_row_of_no_form_is_named(row: object, param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        read_edits([row])
    assert refusal.value.param == param
