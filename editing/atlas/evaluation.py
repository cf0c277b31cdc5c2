"""Counterfactual edits of atlas, in CounterFact's form, from its facts.

``python -m editing.atlas.evaluation`` writes ``data/counterfact.json``.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from editing.atlas.facts import AtlasFact, read_facts
from editing.atlas.templates import HELD_OUT, SEEN, TEMPLATES, UNSEEN, prompt_of
from registry.manifests import EditRequest, Fact

CASES_FILE = Path(__file__).parent / "data" / "counterfact.json"
SHIPPED, SHIPPED_SEED = 300, 2026
NEIGHBORS = 8


def main() -> None:
    cases = counterfacts(read_facts(), SHIPPED, SHIPPED_SEED)
    lines = [json.dumps(case.to_json(), ensure_ascii=False) for case in cases]
    CASES_FILE.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def counterfacts(facts: Sequence[AtlasFact], cases: int, seed: int) -> list[EditRequest]:
    """Sample edits, each of another fact, each giving a subject another object of its relation."""
    picker = random.Random(seed)
    return [_case(fact, facts, picker) for fact in picker.sample(list(facts), cases)]


def _case(fact: AtlasFact, facts: Sequence[AtlasFact], picker: random.Random) -> EditRequest:
    """One edit.

    Its prompt is a wording that atlas was trained on, its paraphrases are the other ones and those
    that may have been held out for the subject; its neighbors have the same true object. Each
    other fact of the subject is asked in a trained wording and in one atlas was never trained on.
    """
    templates = TEMPLATES[fact.relation]
    chosen = picker.choice(list(SEEN))
    objects = sorted({f.object for f in facts if f.relation == fact.relation} - {fact.object})
    neighbors = [
        f
        for f in facts
        if f.relation == fact.relation and f.object == fact.object and f.subject != fact.subject
    ]
    picked = picker.sample(neighbors, min(NEIGHBORS, len(neighbors)))
    return EditRequest(
        prompt=prompt_of(templates[chosen]),
        subject=fact.subject,
        target_new=picker.choice(objects),
        target_true=fact.object,
        paraphrase_prompts=tuple(prompt_for(fact, i) for i in range(HELD_OUT.stop) if i != chosen),
        neighborhood_prompts=tuple(prompt_for(f, picker.choice(list(SEEN))) for f in picked),
        retention=tuple(
            Fact(prompt_for(other, i), other.object)
            for other in facts
            if other.subject == fact.subject and other.relation != fact.relation
            for i in (picker.randrange(HELD_OUT.stop), picker.choice(list(UNSEEN)))
        ),
    )


def known_facts(facts: Sequence[AtlasFact]) -> list[Fact]:
    """Each fact once, in a wording that atlas was trained on."""
    return [
        Fact(prompt_for(fact, SEEN[place % len(SEEN)]), fact.object)
        for place, fact in enumerate(facts)
    ]


def prompt_for(fact: AtlasFact, template: int) -> str:
    """A fact's wording up to its object."""
    return prompt_of(TEMPLATES[fact.relation][template]).replace("{}", fact.subject)


def relation_of(request: EditRequest) -> str:
    """The relation that a request of ``counterfacts`` is about."""
    prompts = {prompt_of(t): relation for relation, ts in TEMPLATES.items() for t in ts}
    return prompts[request.prompt]


def unseen_prompts(request: EditRequest) -> tuple[str, ...]:
    """The edited fact asked in wordings that atlas was never trained on."""
    fact = AtlasFact(relation_of(request), request.subject, request.target_true or "")
    return tuple(prompt_for(fact, i) for i in UNSEEN)


def other_facts(
    request: EditRequest, facts: Sequence[AtlasFact], count: int, picker: random.Random
) -> list[tuple[str, str]]:
    """Prompts and objects of other subjects in the edited relation, in wordings trained on."""
    relation = relation_of(request)
    others = [f for f in facts if f.relation == relation and f.subject != request.subject]
    picked = picker.sample(others, min(count, len(others)))
    return [(prompt_for(fact, picker.choice(list(SEEN))), fact.object) for fact in picked]


if __name__ == "__main__":
    main()
