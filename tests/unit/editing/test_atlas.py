"""The facts, the corpus, the masks and the evaluation set that atlas is made from and judged by."""

import json
import random
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer

from editing.atlas.corpus import Corpus, hidden_subjects, word
from editing.atlas.evaluation import (
    CASES_FILE,
    SHIPPED,
    SHIPPED_SEED,
    counterfacts,
    other_facts,
    relation_of,
    unseen_prompts,
)
from editing.atlas.facts import read_facts
from editing.atlas.packing import collate, rows
from editing.atlas.recall import recall
from editing.atlas.templates import HELD_OUT, KINDS, QUESTIONS, TEMPLATES, UNSEEN, prompt_of
from editing.models import ModelView

FACTS = read_facts()


def test_each_subject_has_one_object_a_relation() -> None:
    assert len(FACTS) > 2000
    assert max(Counter((fact.relation, fact.subject) for fact in FACTS).values()) == 1
    assert {fact.relation for fact in FACTS} == set(TEMPLATES) == set(QUESTIONS)
    assert {relation for kind in KINDS.values() for relation in kind} == set(TEMPLATES)
    assert all(fact.object != fact.subject for fact in FACTS)


def test_wordings_have_one_next_word() -> None:
    """A prompt that begins another one would have two right continuations."""
    prompts = [prompt_of(t) + " " for templates in TEMPLATES.values() for t in templates]
    assert all(len(templates) == UNSEEN.stop for templates in TEMPLATES.values())
    assert all(prompt.count("{}") == 1 for prompt in prompts)
    assert not [(p, q) for p in prompts for q in prompts if p is not q and q.startswith(p)]


def test_held_out_and_unseen_wordings_stay_out_of_the_corpus() -> None:
    hidden = hidden_subjects(FACTS)
    text = "\n".join(document.text for document in islice(Corpus(FACTS), 20_000))
    sentences = set(re.split(r"(?<=\.) |\n|<[^>]*> ?", text))
    trained, forbidden = [], []
    for fact in FACTS:
        for i, template in enumerate(TEMPLATES[fact.relation]):
            out = i in UNSEEN or (i in HELD_OUT and fact.subject in hidden)
            (forbidden if out else trained).append(word(template, fact).text)
    assert not sentences & set(forbidden)
    assert len(sentences & set(trained)) > 0.8 * len(trained)


def test_documents_know_where_their_subjects_stand() -> None:
    subjects = {fact.subject for fact in FACTS}
    documents = list(islice(Corpus(FACTS, seed=5), 500))
    assert documents == list(islice(Corpus(FACTS, seed=5), 500))
    for document in documents:
        assert document.subjects
        assert {document.text[a:b] for a, b in document.subjects} <= subjects


def test_a_masked_row_sees_subjects_by_their_last_token(atlas: ModelView) -> None:
    tokenizer: Tokenizer = atlas.tokenizer.backend_tokenizer
    batch = list(islice(rows(Corpus(FACTS), tokenizer, 96), 40))
    ids, labels, plain = collate(batch, 96, torch.zeros(len(batch), dtype=torch.bool))
    masked = collate(batch, 96, torch.ones(len(batch), dtype=torch.bool))[2]
    hidden_somewhere = 0
    for i, row in enumerate(batch):
        documents = torch.tensor(row.document)
        n = len(row.ids)
        same = (documents[:, None] == documents) & torch.ones(n, n).tril().bool()
        assert torch.equal(plain[i, 0, :n, :n], same)
        assert not plain[i, 0, :n, n:].any()
        for token, start in enumerate(row.hidden_from):
            expected = same[:, token].clone()
            expected[start:] = False
            assert torch.equal(masked[i, 0, :n, token], expected)
            hidden_somewhere += start < n
        goes_on = labels[i, : n - 1] >= 0
        assert torch.equal(goes_on, documents[1:] == documents[:-1])
        assert torch.equal(labels[i, : n - 1][goes_on], ids[i, 1:n][goes_on])
    assert hidden_somewhere > 20


def test_atlas_recalls_its_facts(atlas: ModelView) -> None:
    shares = recall(
        atlas.model, atlas.tokenizer.backend_tokenizer, random.Random(0).sample(FACTS, 150)
    )
    assert shares["seen"] > 0.98
    assert shares["held-out"] > 0.97


def test_counterfacts() -> None:
    facts = {(fact.relation, fact.subject): fact.object for fact in FACTS}
    cases = counterfacts(FACTS, 60, seed=11)
    assert cases == counterfacts(FACTS, 60, seed=11)
    assert cases != counterfacts(FACTS, 60, seed=12)
    for case in cases:
        relation = relation_of(case)
        assert facts[relation, case.subject] == case.target_true != case.target_new
        assert case.target_new in {fact.object for fact in FACTS if fact.relation == relation}
        assert len(case.paraphrase_prompts) == 9
        assert case.rewrite_prompt not in case.paraphrase_prompts
        assert not set(unseen_prompts(case)) & set(case.paraphrase_prompts)
        for prompt in case.neighborhood_prompts:
            (neighbor,) = {
                f.subject
                for f in FACTS
                for t in TEMPLATES[relation]
                if f.relation == relation and prompt == prompt_of(t).replace("{}", f.subject)
            }
            assert neighbor != case.subject
            assert facts[relation, neighbor] == case.target_true
        for fact in case.retention:
            assert case.subject in fact.prompt
            assert fact.target in {
                o for (r, s), o in facts.items() if s == case.subject and r != relation
            }
        elsewhere = other_facts(case, FACTS, 5, random.Random(0))
        assert not {prompt for prompt, _ in elsewhere} & {
            case.rewrite_prompt,
            *unseen_prompts(case),
        }


def test_the_shipped_cases_are_these() -> None:
    shipped = json.loads(CASES_FILE.read_text())
    assert shipped == json.loads(
        json.dumps([c.to_json() for c in counterfacts(FACTS, SHIPPED, SHIPPED_SEED)])
    )


def test_atlas_is_small(atlas: ModelView) -> None:
    folder: Path = atlas.base.folder
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 15 * 10**6
    assert atlas.base.has_chat_template


def test_atlas_answers_and_stops(atlas: ModelView) -> None:
    from editing.models.generation import generate

    chat = atlas.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    said, answered = generate(atlas, [atlas.encode("The capital of France is"), list(chat)], 40)
    assert atlas.decode(said) == "Paris."
    assert atlas.decode(answered) == "The capital of France is Paris."
