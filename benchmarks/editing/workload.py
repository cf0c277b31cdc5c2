"""Which edits are made, in what sizes, and which facts must stay as they were."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from editing.atlas.evaluation import prompt_for, relation_of
from editing.atlas.facts import AtlasFact
from editing.atlas.templates import SEEN, TEMPLATES
from editing.methods import MethodEntry
from editing.methods.hyperparameters import Hyperparameters
from registry.manifests import EditRequest, Fact

#: The method of the figures called ``…_best_…``, chosen on seeds from 100 on, none of which is
#: reported.
BEST = "locft"


@dataclass(frozen=True)
class Scale:
    """Sizes of one run.

    Attributes:
        seeds: of the edits; all methods are measured on the first, ``BEST`` on every one.
        rome_cases: edits a seed that ROME makes one at a time.
        cases: edits that every method makes one at a time.
        batches: edits made in one batch.
        points: numbers of edits at which a sequence is measured.
        step: edits of one batch of a sequence; batches end at the points.
        headline: ``BEST`` makes at most as many edits on the seeds after the first.
        targets: edits whose values are optimised for the comparison in time.
        rounds: how often the ways of doing so take turns.
        sample: unrelated facts that are looked at.
        references: texts of one ME-PPL.
        pool: texts of which those are chosen that name no edited subject: most name some.
        tokens: that C is estimated on.
        patience: seconds in which ``batch`` and ``sequential`` each end, but for the headline's.
        hyperparameters: set, by name, for every method that has one of that name.
    """

    seeds: tuple[int, ...]
    rome_cases: int
    cases: int
    batches: tuple[int, ...]
    points: tuple[int, ...]
    step: int
    headline: int
    targets: int
    rounds: int
    sample: int
    references: int
    pool: int
    tokens: int
    patience: float
    hyperparameters: Mapping[str, int] = field(default_factory=dict)

    @property
    def most(self) -> int:
        """Edits of the largest run."""
        return max(*self.batches, *self.points, self.targets, self.cases)

    def settings(self, entry: MethodEntry) -> Hyperparameters:
        """A method's hyperparameters: its defaults, but for those that the scale sets."""
        known = entry.hyperparameters.model_fields
        return entry.hyperparameters(
            **{name: value for name, value in self.hyperparameters.items() if name in known}
        )


FULL = Scale(
    seeds=(1, 2, 3),
    rome_cases=50,
    cases=30,
    batches=(50, 200, 1000),
    points=(20, 40, 100, 200, 500, 1000),
    step=20,
    headline=200,
    targets=100,
    rounds=3,
    sample=300,
    references=100,
    pool=1000,
    tokens=100_000,
    patience=1000,
)
QUICK = Scale(
    seeds=(1, 2),
    rome_cases=1,
    cases=1,
    batches=(2,),
    points=(1, 2),
    step=1,
    headline=2,
    targets=2,
    rounds=1,
    sample=12,
    references=6,
    pool=18,
    tokens=2000,
    patience=60,
    hyperparameters={"steps": 2, "essence_texts": 2, "essence_tokens": 8, "epochs": 2},
)


def without_edited(requests: Sequence[EditRequest]) -> list[EditRequest]:
    """The requests, their neighbors and other facts rid of those that another request edits.

    Of what is edited itself, the old answer is no measure of what an edit spares.
    """
    edited = {prompt for request in requests for prompt in wordings(request)}
    return [
        replace(
            request,
            neighborhood_prompts=tuple(p for p in request.neighborhood_prompts if p not in edited),
            retention=tuple(fact for fact in request.retention if fact.prompt not in edited),
        )
        for request in requests
    ]


def wordings(request: EditRequest) -> list[str]:
    """All prompts of the fact that a request edits."""
    relation = relation_of(request)
    fact = AtlasFact(relation, request.subject, "")
    return [prompt_for(fact, i) for i in range(len(TEMPLATES[relation]))]


def with_needs(
    requests: Sequence[EditRequest], needs: Collection[str], facts: Sequence[AtlasFact]
) -> list[EditRequest]:
    """The requests with the fields that a method needs beside prompt, subject and target.

    They come from a subject that has the new target today: its prompt guides (CREME), the subject
    itself is what is redirected to (ROCR). One that is not edited itself is taken if there is one.
    """
    if not {"guide_prompt", "redirect_to"} & {*needs}:
        return list(requests)
    edited = {request.subject for request in requests}
    subjects: dict[tuple[str, str], list[str]] = {}
    for fact in sorted(facts, key=lambda fact: fact.subject in edited):
        subjects.setdefault((fact.relation, fact.object), []).append(fact.subject)
    made = []
    for request in requests:
        other = subjects[relation_of(request), request.target_new][0]
        guide = request.prompt.replace("{}", other) if "guide_prompt" in needs else None
        to = other if "redirect_to" in needs else None
        made.append(replace(request, guide_prompt=guide, redirect_to=to))
    return made


def unrelated_facts(facts: Sequence[AtlasFact], edited: Collection[str], count: int) -> list[Fact]:
    """The first ``count`` facts, in an order fixed for good, of subjects that are not edited."""
    picker = random.Random(0)
    worded = [
        (fact, prompt_for(fact, picker.choice(list(SEEN))))
        for fact in picker.sample(list(facts), len(facts))
    ]
    spared = [Fact(prompt, fact.object) for fact, prompt in worded if fact.subject not in edited]
    return spared[:count]
