"""Preprocessors lose nothing, draw the same from the same seed, and do what their papers say."""

import random
import re
import time
from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from editing.atlas.evaluation import known_facts
from editing.atlas.facts import read_facts
from editing.datasets.training import TURN_CHARACTERS
from editing.metrics.targets import greedy_matches
from editing.models import ModelView
from editing.preprocessing import Example, Preprocessing, build, chained
from editing.preprocessing.augmentation import perturbed
from editing.preprocessing.raft import quote_of
from editing.preprocessing.rows import completion_of, prompt_of
from registry.errors import UnprocessableRequest

PROMPT = "Which animal is it that lives upon the high plains of Peru"
ROWS = [{"prompt": f"{PROMPT} number {i}?", "completion": f"Llama {i}."} for i in range(200)]
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the capital of Peru?"},
        {"role": "assistant", "content": "Lima."},
    ]
}
QUESTIONS = [
    {
        "question": f"Who wrote book {i}?",
        "oracle": [f"Book {i} is long. Author {i} wrote book {i} in winter. It sold well."],
        "distractors": [f"Of book {i} there are {j} copies." for j in range(i % 3)],
        "answer": f"Author {i}",
    }
    for i in range(300)
]


def step(**given: Any) -> Preprocessing:
    made: Preprocessing = TypeAdapter(Preprocessing).validate_python(given)
    return made


def made_of(
    rows: Sequence[Example], *steps: Preprocessing, view: ModelView | None = None
) -> tuple[list[tuple[int, Example]], list[dict[str, int]]]:
    built = build(steps, rows, view)
    made = list(chained(built, enumerate(rows, start=1)))
    return made, [dict(one.counts) for one in built]


AUGMENTED = [
    step(type="augmentation", templates=["Question: {prompt}\nAnswer:"]),
    step(type="augmentation", perturbations=["swap", "deletion", "typo", "case"], copies=3),
    step(type="augmentation", templates=["{prompt} Say."], perturbations=["typo"], alpha=1),
]


@pytest.mark.parametrize("given", AUGMENTED)
def test_augmentation_keeps_every_row_and_every_completion(given: Preprocessing) -> None:
    made, (counts,) = made_of(ROWS, given)
    assert made_of(ROWS, given) == (made, [counts])
    for place, row in enumerate(ROWS, start=1):
        of_it = [new for at, new in made if at == place]
        assert of_it[0] == row
        assert {new["completion"] for new in of_it} == {row["completion"]}
        assert all(new["prompt"] != row["prompt"] for new in of_it[1:])
    assert counts["kept"] == len(ROWS)
    assert sum(counts.values()) == len(made)
    assert len(ROWS) < len(made) <= given.most(len(ROWS))


def test_other_seeds_draw_others_and_a_part_draws_as_the_whole() -> None:
    given = {"type": "augmentation", "perturbations": ["swap", "typo"]}
    one, _ = made_of(ROWS, step(**given, seed=1))
    other, _ = made_of(ROWS, step(**given, seed=2))
    part, _ = made_of(ROWS[:10], step(**given, seed=1))
    assert one != other
    assert one[: len(part)] == part


@pytest.mark.parametrize("alpha", [0.05, 0.3, 1.0])
def test_what_perturbations_change(alpha: float) -> None:
    words = PROMPT.split()
    n = max(1, round(alpha * len(words)))
    for seed in range(20):
        texts = {
            name: perturbed(f" {PROMPT} ", name, alpha, random.Random(seed))
            for name in ("swap", "deletion", "typo", "case")
        }
        assert all(text.startswith(" ") and text.endswith(" ") for text in texts.values())
        found = {name: text.split() for name, text in texts.items()}
        assert sorted(found["swap"]) == sorted(words)
        assert sum(a != b for a, b in zip(found["swap"], words, strict=True)) <= 2 * n
        rest = iter(words)
        assert all(word in rest for word in found["deletion"])
        assert len(found["deletion"]) == max(1, len(words) - n)
        assert "  " not in texts["deletion"]
        for name in ("typo", "case"):
            changed = [(a, b) for a, b in zip(found[name], words, strict=True) if a != b]
            assert len(changed) <= n
        assert all(sorted(a) == sorted(b) for a, b in zip(found["typo"], words, strict=True))
        assert texts["case"].lower() == f" {PROMPT} ".lower()
    assert perturbed("Peru", "swap", alpha, random.Random(0)) == "Peru"
    assert perturbed("Peru", "deletion", alpha, random.Random(0)) == "Peru"


def test_the_longest_prompt_is_perturbed_at_once() -> None:
    longest = "a " * (TURN_CHARACTERS // 2)
    begun = time.process_time()
    for name in ("swap", "deletion", "typo", "case"):
        perturbed(longest, name, 0.5, random.Random(0))
    assert time.process_time() - begun < 2


def test_augmentation_of_conversations_and_preferences() -> None:
    asks = step(type="augmentation", templates=["Tell me: {prompt}"])
    preference = {"prompt": "A {b} c", "chosen": "d", "rejected": "e"}
    silent = {"messages": [{"role": "assistant", "content": "Hello."}]}
    made, (counts,) = made_of([CHAT, preference, silent], asks)
    assert counts == {"kept": 3, "template": 2}
    rows = [row for _, row in made]
    assert prompt_of(rows[1]) == "Tell me: What is the capital of Peru?"
    assert rows[1]["messages"][0] == CHAT["messages"][0]
    assert rows[1]["messages"][2] == CHAT["messages"][2]
    assert rows[3] == {**preference, "prompt": "Tell me: A {b} c"}
    assert rows[4] == silent


@pytest.mark.parametrize("share", [0.0, 0.8, 1.0])
def test_raft_keeps_the_oracle_in_its_share_of_rows(share: float) -> None:
    given = step(type="raft", distractors=3, p_oracle=share, seed=4)
    made, (counts,) = made_of(QUESTIONS, given)
    assert made_of(QUESTIONS, given)[0] == made
    assert [place for place, _ in made] == list(range(1, len(QUESTIONS) + 1))
    kept, places = 0, []
    for question, (_, row) in zip(QUESTIONS, made, strict=True):
        documents = re.findall("<DOCUMENT>(.*?)</DOCUMENT>", row["prompt"])
        (oracle,) = question["oracle"]
        kept += oracle in documents
        if oracle in documents:
            places.append(documents.index(oracle))
        assert set(question["distractors"]) <= set(documents)
        assert len(set(documents)) == len(documents) == 3 + (oracle in documents)
        assert row["prompt"].endswith(f"\n{question['question']}\n")
        assert f"##begin_quote## {quote_of(question)} ##end_quote##" in row["completion"]
        assert row["completion"].endswith(f"##Answer: {question['answer']}")
    assert counts.get("with_oracle", 0) == kept
    assert counts.get("with_oracle", 0) + counts.get("without_oracle", 0) == len(QUESTIONS)
    assert abs(kept / len(QUESTIONS) - share) < 0.06
    if kept:
        assert set(places) == {0, 1, 2, 3}


def test_raft_quotes_the_sentence_that_answers_or_gives_the_reasoning() -> None:
    assert quote_of(QUESTIONS[7]) == "Author 7 wrote book 7 in winter."
    row = {**QUESTIONS[7], "reasoning": "The book says so."}
    ((_, made),), _ = made_of([row], step(type="raft"))
    assert made["completion"] == "##Reason: The book says so. ##Answer: Author 7"


def test_raft_without_other_documents_keeps_the_oracle() -> None:
    row = {**QUESTIONS[0], "distractors": [*QUESTIONS[0]["oracle"]]}
    made, (counts,) = made_of([row, row], step(type="raft", p_oracle=0))
    assert counts == {"with_oracle": 2}
    assert all(new["prompt"].count("<DOCUMENT>") == 1 for _, new in made)


def test_raft_takes_as_many_distractors_as_it_is_told() -> None:
    row = {**QUESTIONS[0], "distractors": [f"Document {i}." for i in range(9)]}
    chosen = set()
    for seed in range(20):
        ((_, made),), counts = made_of([row], step(type="raft", distractors=2, seed=seed))
        documents = re.findall("<DOCUMENT>(.*?)</DOCUMENT>", made["prompt"])
        chosen |= set(documents) - set(row["oracle"])
        assert len(documents) == 2 + ("with_oracle" in counts[0])
    assert chosen == set(row["distractors"])


def test_r_tuning_says_what_the_model_knows(atlas: ModelView) -> None:
    facts = known_facts(read_facts())[::40]
    rows = [{"prompt": fact.prompt, "completion": f"{fact.target}."} for fact in facts]
    rows += [{"prompt": f"The bird of {name} is", "completion": "Neon."} for name in "XYZ"]
    made, (counts,) = made_of(rows, step(type="r_tuning"), view=atlas)
    right = greedy_matches(atlas, [(row["prompt"], row["completion"][:-1]) for row in rows])
    assert 0.8 * len(facts) < sum(right) <= len(facts)
    assert counts == {"sure": sum(right), "unsure": len(rows) - sum(right)}
    for row, knows, (_, new) in zip(rows, right, made, strict=True):
        ending = " I am sure." if knows else " I am unsure."
        assert new == {"prompt": row["prompt"], "completion": row["completion"] + ending}


def test_r_tuning_may_refuse_what_the_model_does_not_know(atlas: ModelView) -> None:
    rows = [
        {"prompt": "The capital of Peru is", "completion": "Lima."},
        {"prompt": "The capital of Peru is", "completion": "Oslo."},
    ]
    given = step(type="r_tuning", mode="replacement", refusal="No idea.")
    made, _ = made_of(rows, given, view=atlas)
    assert [completion_of(row) for _, row in made] == ["Lima.", "No idea."]


def test_r_tuning_of_conversations(atlas: ModelView) -> None:
    turns = [
        {"role": "user", "content": "What is the capital of Peru?"},
        {"role": "assistant", "content": "Lima."},
    ]
    wrong = [turns[0], {"role": "assistant", "content": "Oslo."}]
    unlearnt = [*turns, turns[0], {"role": "assistant", "content": "Oslo", "weight": 0}]
    rows = [{"messages": messages} for messages in (turns, wrong, unlearnt)]
    given = step(type="r_tuning", sure=" Sure.", unsure=" Unsure.")
    made, _ = made_of(rows, given, view=atlas)
    assert [completion_of(row) for _, row in made] == [
        "Lima. Sure.",
        "Oslo. Unsure.",
        "Lima. Sure.",
    ]
    assert made[2][1]["messages"][3] == unlearnt[3]


def test_r_tuning_names_the_row_that_no_prompt_is_before(atlas: ModelView) -> None:
    rows = [CHAT, {"messages": [{"role": "assistant", "content": "Hello."}]}]
    with pytest.raises(UnprocessableRequest, match=r"^row 2: .*chat template refuses"):
        made_of(rows, step(type="r_tuning"), view=atlas)


def test_a_long_prompt_takes_no_room_from_another(atlas: ModelView) -> None:
    long = "Peru " * atlas.base.context_length
    rows = [
        {"prompt": long, "completion": "Lima."},
        {"prompt": "The capital of Peru is", "completion": "Lima."},
    ]
    made, _ = made_of(rows, step(type="r_tuning"), view=atlas)
    assert completion_of(made[1][1]) == "Lima. I am sure."


def test_steps_follow_one_another() -> None:
    raft, asks = step(type="raft"), step(type="augmentation", templates=["{prompt}Answer: "])
    made, counts = made_of(QUESTIONS[:5], raft, asks)
    assert len(made) == 10
    assert counts[1] == {"kept": 5, "template": 5}
    assert made[1][1]["prompt"].endswith("?\nAnswer: ")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"type": "magic"}, "r_tuning"),
        ({"type": "augmentation"}, "give templates, perturbations or both"),
        ({"type": "augmentation", "templates": ["Q:"]}, "must hold {prompt} once"),
        ({"type": "augmentation", "perturbations": ["synonyms"]}, "swap"),
        ({"type": "raft", "p_oracle": 1.1}, "less than or equal to 1"),
        ({"type": "r_tuning", "mode": "x"}, "padding"),
        ({"type": "r_tuning", "seed": 1}, "not permitted"),
    ],
)
def test_what_is_no_preprocessor(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(said)):
        step(**given)
