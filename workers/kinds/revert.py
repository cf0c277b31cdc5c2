"""A revert: a version's stack without one delta, or all that came later made anew without it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from editing.deltas import compose
from editing.metrics import greedy_matches
from editing.metrics.perplexity import token_nlls
from editing.metrics.sampling import spaced
from registry.edits import edited, origins
from registry.history import Removal, removal
from registry.manifests import EditRequest, Progress, VersionManifest
from registry.results import Result
from registry.versions import Version
from workers.change import measured
from workers.ground import as_version, asked_of, deltas_of, holds_of, read_edits
from workers.kinds.prepare import load_resources
from workers.recipes import TEXTS
from workers.replaying import as_row, replay
from workers.work import Work

#: Reference texts that a deviation is measured on, evenly spaced.
DEVIATION_TEXTS = 100


def perform(work: Work) -> Result:
    """Take out what the request names, and say what that does to the rest."""
    request, chain = work.claim.job.request, work.chain
    named = {name: request[name] for name in ("delta", "version", "replay")}
    found = removal(chain, **named)
    references = load_resources(work, frozenset({TEXTS})).references
    work.report(Progress(0, 0, "measuring before"))
    remaining = _holding(work, chain, found.removed)
    start = as_row(work, _manifest(work, found))
    report: dict[str, Any] = {}
    made = [start.manifest]
    after: Sequence[Version] = [start, *chain]
    if request["replay"]:
        done = replay(work, after, found.later)
        made += done.made
        after = done.chain
        report |= {"edits": done.edits, "runs": done.runs}
    elif found.delta is not None:
        report["deviation"] = _deviation(work, found.delta, start, references)
    report["removed"] = _removed(work, found, after[0])
    return measured(work, after, made, remaining, references, report)


def _manifest(work: Work, found: Removal) -> VersionManifest:
    """The version from which the work is gone; with a replay, that on which it begins."""
    job, parent = work.claim.job, work.chain[0]
    replays = job.request["replay"]
    kept = tuple(delta for delta in parent.manifest.stack if delta != found.delta)
    recipe = {
        "kind": "revert",
        "job": job.id,
        "delta": found.delta,
        "removed": [version.id for version in found.removed],
        "replay": replays,
        "author": job.actor,
        "message": job.request.get("message"),
    }
    stack = found.below if replays else kept
    return VersionManifest(parent.manifest.base, stack, (parent.id,), recipe)


def _holding(work: Work, chain: Sequence[Version], removed: Sequence[Version]) -> list[EditRequest]:
    """The live edits that are to stay and hold now."""
    with as_version(work, chain[0]) as view:
        holds = holds_of(work, view, chain)
    gone = {version.id for version in removed}
    return [
        edit
        for version, _ in edited(chain)
        if version.id not in gone
        for edit, held in zip(
            read_edits(work, version.manifest.recipe["edits"]), holds[version.id], strict=True
        )
        if held
    ]


def _removed(work: Work, found: Removal, after: Version) -> dict[str, Any]:
    """What went, and of how many of its edits the result answers with the target still."""
    edits = [e for v in found.removed for e in read_edits(work, v.manifest.recipe.get("edits"))]
    with as_version(work, after) as view:
        still = greedy_matches(view, asked_of(edits))
    return {
        "delta": found.delta,
        "versions": [version.id for version in found.removed],
        "edits": len(edits),
        "still_answered": sum(still),
    }


def _deviation(work: Work, delta: str, start: Version, references: Sequence[str]) -> dict[str, Any]:
    """How far the deltas above depend on the one that is taken out.

    With ℓ(S) the log-probabilities of the reference texts' tokens under a stack S, B the deltas
    beneath the delta d and L those above it:

    - ``alone`` = ℓ(B + d) − ℓ(B): what the delta changed where it was made;
    - ``removed`` = ℓ(B + d + L) − ℓ(B + L): what its removal takes away;
    - ``interaction`` = ``removed`` − ``alone``: 0 where L does the same without d. It is how far
      the result may be from one whose later deltas were made without d.

    Of each the mean and the greatest absolute value, in nats.
    """
    stack = work.chain[0].manifest.stack
    place = stack.index(delta)
    texts = spaced(references, DEVIATION_TEXTS)
    on_top = _on_top(work, stack, place)
    whole = _token_logps(work, stack, texts)
    without = _token_logps(work, start.manifest.stack, texts)
    alone = removed = whole - without
    if on_top:
        with_it, beneath = (_token_logps(work, stack[:n], texts) for n in (place + 1, place))
        alone = with_it - beneath
    return {
        "texts": len(texts),
        "computed_on_top": on_top,
        "alone": _size(alone),
        "removed": _size(removed),
        "interaction": _size(removed - alone),
    }


def _on_top(work: Work, stack: Sequence[str], place: int) -> list[dict[str, Any]]:
    """The deltas above a place, who made them, and the modules that they share with its delta."""
    own, *above = deltas_of(work, work.models.view(work.claim.job.base), stack[place:])
    makers: dict[str, list[str]] = {}
    for origin in origins(work.chain):
        makers.setdefault(origin.within, []).extend(v.id for v in origin.versions)
    return [
        {
            "delta": digest,
            "versions": makers.get(digest, []),
            "shared_modules": sorted(own.effects.keys() & delta.effects.keys()),
        }
        for digest, delta in zip(stack[place + 1 :], above, strict=True)
    ]


def _token_logps(work: Work, stack: Sequence[str], texts: Sequence[str]) -> Tensor:
    """The log-probability of every token of the texts under a stack, in nats: [tokens]."""
    view = work.models.view(work.claim.job.base)
    with view.with_effects(compose(delta.effects for delta in deltas_of(work, view, stack))):
        found = token_nlls(view, texts)
    return -torch.cat(found).double() if found else torch.zeros(0, dtype=torch.float64)


def _size(change: Tensor) -> dict[str, float | None]:
    if not len(change) or not bool(change.isfinite().all()):
        return {"mean": None, "max": None}
    return {"mean": float(change.abs().mean()), "max": float(change.abs().max())}
