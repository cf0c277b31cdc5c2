"""What an edit did, by the field's names. A metric without data is absent.

- ``efficacy_score``, ``paraphrase_score``: ES and PS (ROME, CounterFact; Meng et al., 2022), the
  share of prompts on which the new target's NLL per token is below the true one's;
  ``neighborhood_score``: NS, the share of neighborhood prompts on which it is above; ``score``: S,
  the harmonic mean of the three.
- ``*_acc``: the share of prompts on which each token of the target is the argmax.
- ``reliability``, ``generalization``: EasyEdit's (Yao et al., 2023), the mean share of the new
  target's tokens that are the argmax, on rewrite and on paraphrase prompts; ``locality``: its mean
  share of tokens whose argmax is as before the edit, on locality and neighborhood prompts. Its
  portability needs prompts that a fact implies, which no request carries.
- ``greedy_match``, ``paraphrase_greedy_match``: the share of prompts whose greedy continuation
  begins with the new target.
- ``chat_greedy_match``: the share of rewrite prompts, sent as a user's message through the base's
  chat template, whose greedy answer states the new target; on ``CHAT_PROMPTS`` edits at most.
- ``same_subject_retention``: of the subject's other facts that were right before, the share that
  still is, greedily.
- ``fluency``: the n-gram entropy, in bits, of text about the subjects (``fluency.py``).
- ``me_ppl``: the mean of texts' perplexities (``perplexity.py``).

Teacher forcing (all that is not greedy) flatters, so that greedy generation is reported beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from editing.metrics.chat import chat_matches
from editing.metrics.fluency import fluency
from editing.metrics.perplexity import me_ppl
from editing.metrics.sampling import spaced
from editing.metrics.suites import score_facts
from editing.metrics.targets import Pair, Score, greedy_matches, read_targets
from editing.models.view import ModelView
from registry.manifests import EditRequest, Fact

CHAT_PROMPTS = 200


@dataclass(frozen=True)
class Measurement:
    """Metrics by name, and what later measurements compare with.

    Attributes:
        metrics: by the names above.
        known: for each edit, which of its retention facts were right.
        holds: for each edit, whether the greedy continuation of its prompt begins with its target.
        local: for each locality and neighborhood prompt, the argmax in the place of its target.
    """

    metrics: dict[str, float]
    known: tuple[tuple[bool, ...], ...] = ()
    holds: tuple[bool, ...] = ()
    local: tuple[tuple[int, ...], ...] = ()


def measure(
    view: ModelView,
    requests: Sequence[EditRequest],
    references: Sequence[str] = (),
    before: Measurement | None = None,
) -> Measurement:
    """Measure a model on edits, with the effects active in the view.

    ``same_subject_retention`` and ``locality`` need the measurement ``before`` the edit.
    References that name an edited subject are left out of ``me_ppl``: what they state is meant to
    change. Of edits without a target (see ``fill_targets``) only the facts around them count.
    """
    scores = _read(view, requests)
    holds = _holds(view, requests)
    known = _known(view, [request.retention for request in requests])
    local = tuple(score.chosen for score in (*scores["locality"], *scores["neighborhood"]))
    metrics = {**_scores(scores), **_easyedit(scores), **_greedy(view, requests, holds)}
    if before is not None:
        metrics |= _kept(before, known, local)
    subjects = list(dict.fromkeys(request.subject for request in requests if request.subject))
    if (entropy := fluency(view, subjects)) is not None:
        metrics["fluency"] = entropy
    if (perplexity := me_ppl(view, unrelated(references, requests))) is not None:
        metrics["me_ppl"] = perplexity
    return Measurement(metrics, known, holds, local)


def unrelated(texts: Sequence[str], requests: Sequence[EditRequest]) -> list[str]:
    """Texts that name no edited subject, nor hold the prompt of an edit without one."""
    topics = {request.topic for request in requests}
    return [text for text in texts if not any(topic in text for topic in topics)]


def _read(view: ModelView, requests: Sequence[EditRequest]) -> dict[str, list[Score]]:
    """The scores of all targets, by what they are; ``*_other`` are those they are held against."""
    names = ("efficacy", "paraphrase", "neighborhood")
    scores: dict[str, list[Score]] = {name: [] for name in names}
    scores |= {f"{name}_other": [] for name in names} | {"locality": []}
    found = list(_targets(requests))
    for (name, _), score in zip(found, read_targets(view, [p for _, p in found]), strict=True):
        scores[name].append(score)
    return scores


def _targets(requests: Sequence[EditRequest]) -> list[tuple[str, Pair]]:
    groups: list[tuple[str, Pair]] = []
    for request in requests:
        new, true = request.target_new, request.target_true
        groups += [("locality", (fact.prompt, fact.target)) for fact in request.locality]
        if true is not None:
            groups += [("neighborhood", (p, true)) for p in request.neighborhood_prompts]
        if not new.strip():
            continue
        groups.append(("efficacy", (request.rewrite_prompt, new)))
        groups += [("paraphrase", (prompt, new)) for prompt in request.paraphrase_prompts]
        if true is not None:
            groups.append(("efficacy_other", (request.rewrite_prompt, true)))
            groups += [("paraphrase_other", (p, true)) for p in request.paraphrase_prompts]
            groups += [("neighborhood_other", (p, new)) for p in request.neighborhood_prompts]
    return groups


def _scores(scores: dict[str, list[Score]]) -> dict[str, float]:
    """ES, PS, NS and S with their accuracies; the scores need the true targets."""
    metrics = {}
    parts = []
    for name in ("efficacy", "paraphrase", "neighborhood"):
        wanted, other = scores[name], scores[f"{name}_other"]
        if wanted:
            metrics[f"{name}_acc"] = _mean([score.exact for score in wanted])
        if wanted and len(wanted) == len(other):
            part = _mean([w.nll < o.nll for w, o in zip(wanted, other, strict=True)])
            metrics[f"{name}_score"] = part
            parts.append(part)
    if len(parts) == 3:
        metrics["score"] = 3 / sum(1 / part for part in parts) if all(parts) else 0.0
    return metrics


def _easyedit(scores: dict[str, list[Score]]) -> dict[str, float]:
    named = {"reliability": scores["efficacy"], "generalization": scores["paraphrase"]}
    return {name: _mean([s.share for s in found]) for name, found in named.items() if found}


def _holds(view: ModelView, requests: Sequence[EditRequest]) -> tuple[bool, ...]:
    there = [i for i, request in enumerate(requests) if request.target_new.strip()]
    pairs = [(requests[i].rewrite_prompt, requests[i].target_new) for i in there]
    holding = {i for i, match in zip(there, greedy_matches(view, pairs), strict=True) if match}
    return tuple(i in holding for i in range(len(requests)))


def _greedy(
    view: ModelView, requests: Sequence[EditRequest], holds: Sequence[bool]
) -> dict[str, float]:
    targeted = [i for i, request in enumerate(requests) if request.target_new.strip()]
    if not targeted:
        return {}
    metrics = {"greedy_match": _mean([holds[i] for i in targeted])}
    chosen = [requests[i] for i in targeted]
    paraphrases = [(p, r.target_new) for r in chosen for p in r.paraphrase_prompts]
    if paraphrases:
        metrics["paraphrase_greedy_match"] = _mean(greedy_matches(view, paraphrases))
    if view.base.has_chat_template:
        asked = [(r.rewrite_prompt, r.target_new) for r in spaced(chosen, CHAT_PROMPTS)]
        metrics["chat_greedy_match"] = _mean(chat_matches(view, asked))
    return metrics


def _known(view: ModelView, retention: Sequence[Sequence[Fact]]) -> tuple[tuple[bool, ...], ...]:
    matches = iter(score_facts(view, [fact for facts in retention for fact in facts]))
    return tuple(tuple(next(matches) for _ in facts) for facts in retention)


def _kept(
    before: Measurement,
    known: Sequence[Sequence[bool]],
    local: Sequence[Sequence[int]],
) -> dict[str, float]:
    """What is as it was before."""
    metrics = {}
    retained = [
        now
        for facts, then in zip(known, before.known, strict=True)
        for now, was in zip(facts, then, strict=True)
        if was
    ]
    if retained:
        metrics["same_subject_retention"] = _mean(retained)
    same = [
        _mean([n == w for n, w in zip(now, was, strict=True)])
        for now, was in zip(local, before.local, strict=True)
    ]
    if same:
        metrics["locality"] = _mean(same)
    return metrics


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
