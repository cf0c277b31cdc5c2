"""An evaluation: base + a version's stack -> metrics, kept as a report on the version."""

from __future__ import annotations

from typing import Any

from editing.evaluation import Asked, evaluate
from registry.manifests import Fact, HarmPrompt, Question
from registry.results import Result
from workers.evidence import own_refusals
from workers.ground import parent_of, read_edits
from workers.kinds.prepare import load_resources
from workers.recipes import TEXTS
from workers.work import Work


def perform(work: Work) -> Result:
    """Measure the parent on what the request names. No version is made."""
    job = work.claim.job
    _, view, stack = parent_of(work)
    found = work.follow(evaluate(view, stack, _asked(work)))
    work.models.check_untouched(job.base)
    metrics = found.pop("metrics")
    return Result(metrics=metrics | found, report={"kind": job.kind, "metrics": metrics, **found})


def _asked(work: Work) -> Asked:
    request = work.claim.job.request
    base = work.models.view(work.claim.job.base).base

    def rows(name: str) -> list[Any]:
        digest = request.get(name)
        return [] if digest is None else list(work.artifacts.rows(digest))

    texts = rows("texts")
    ordinary = texts
    if request["detect"] and not texts:
        resources = load_resources(work, frozenset({TEXTS}))
        ordinary = [*resources.texts, *resources.references]
    return Asked(
        edits=read_edits(work, request["edits"]),
        texts=texts,
        facts=[Fact(**row) for row in rows("facts")],
        questions=[Question.from_json(row) for row in rows("suite")],
        harm=[HarmPrompt(**row) for row in rows("harm")],
        refusals=own_refusals(work.settings, base),
        prompts=(request["editability"] or {}).get("prompts", ()),
        detect=request["detect"],
        ordinary=ordinary,
    )
