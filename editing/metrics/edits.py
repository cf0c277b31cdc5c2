"""Efficacy, paraphrase and neighborhood scores, greedy matches, same-subject retention, ME-PPL.

Scores follow ROME and CounterFact (Meng et al., 2022): the share of prompts on which the new
target's length-normalised NLL is below the true one's (on neighborhood prompts: above). ``*_acc``
is the share on which every target token is the argmax. Teacher forcing flatters, so that greedy
generation is reported beside it. A metric without data is absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from editing.metrics.perplexity import me_ppl
from editing.metrics.targets import Pair, greedy_matches, score_targets
from editing.models.view import ModelView
from registry.manifests import EditRequest, Fact


@dataclass(frozen=True)
class Measurement:
    """Metrics by name, and which retention facts were right, so that later ones can compare."""

    metrics: Mapping[str, float]
    known: tuple[tuple[bool, ...], ...]


def measure(
    view: ModelView,
    requests: Sequence[EditRequest],
    references: Sequence[str] = (),
    before: Measurement | None = None,
) -> Measurement:
    """Measure a model on edits, with the effects active in the view.

    ``same_subject_retention`` needs the measurement ``before`` the edit: of the retention facts
    that were right then, the share that still is. References that name an edited subject are left
    out of ``me_ppl``: what they state is meant to change.
    """
    subjects = [request.subject for request in requests]
    references = [text for text in references if not any(s in text for s in subjects)]
    metrics = {**_scores(view, requests), **_greedy(view, requests)}
    known = _known(view, [request.retention for request in requests])
    if before is not None:
        kept = [
            now
            for facts, then in zip(known, before.known, strict=True)
            for now, was in zip(facts, then, strict=True)
            if was
        ]
        if kept:
            metrics["same_subject_retention"] = _share(kept)
    if (perplexity := me_ppl(view, references)) is not None:
        metrics["me_ppl"] = perplexity
    return Measurement(metrics, known)


def _scores(view: ModelView, requests: Sequence[EditRequest]) -> dict[str, float]:
    """ES, PS, NS and S with their accuracies; the scores need the true targets."""
    groups: list[tuple[str, Pair]] = []
    for request in requests:
        new, true = request.target_new, request.target_true
        groups.append(("efficacy", (request.rewrite_prompt, new)))
        groups += [("paraphrase", (prompt, new)) for prompt in request.paraphrase_prompts]
        if true is not None:
            groups.append(("efficacy_other", (request.rewrite_prompt, true)))
            groups += [("paraphrase_other", (p, true)) for p in request.paraphrase_prompts]
            groups += [("neighborhood", (p, true)) for p in request.neighborhood_prompts]
            groups += [("neighborhood_other", (p, new)) for p in request.neighborhood_prompts]
    results: dict[str, list[tuple[float, bool]]] = {}
    scored = score_targets(view, [pair for _, pair in groups])
    for (name, _), result in zip(groups, scored, strict=True):
        results.setdefault(name, []).append(result)
    metrics = {}
    for name in ("efficacy", "paraphrase", "neighborhood"):
        wanted, other = results.get(name, []), results.get(f"{name}_other", [])
        if wanted:
            metrics[f"{name}_acc"] = _share([exact for _, exact in wanted])
        if wanted and len(wanted) == len(other):
            below = [w[0] < o[0] for w, o in zip(wanted, other, strict=True)]
            metrics[f"{name}_score"] = _share(below)
    parts = [metrics.get(f"{n}_score") for n in ("efficacy", "paraphrase", "neighborhood")]
    present = [part for part in parts if part is not None]
    if len(present) == 3:
        metrics["score"] = 3 / sum(1 / part for part in present) if all(present) else 0.0
    return metrics


def _greedy(view: ModelView, requests: Sequence[EditRequest]) -> dict[str, float]:
    rewrites = [(request.rewrite_prompt, request.target_new) for request in requests]
    paraphrases = [(p, r.target_new) for r in requests for p in r.paraphrase_prompts]
    matches = greedy_matches(view, rewrites + paraphrases)
    metrics = {"greedy_match": _share(matches[: len(rewrites)])} if rewrites else {}
    if paraphrases:
        metrics["paraphrase_greedy_match"] = _share(matches[len(rewrites) :])
    return metrics


def _known(view: ModelView, retention: Sequence[Sequence[Fact]]) -> tuple[tuple[bool, ...], ...]:
    matches = iter(
        greedy_matches(view, [(f.prompt, f.target) for facts in retention for f in facts])
    )
    return tuple(tuple(next(matches) for _ in facts) for facts in retention)


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)
