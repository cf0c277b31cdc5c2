"""Recipes that run again: each on top of what those before it have made, in one job."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from editing.metrics import greedy_matches
from registry.errors import InvalidRequest, JobFailed
from registry.history import check_rerun
from registry.manifests import EditRequest, VersionManifest, canonical_json
from registry.versions import READY, Version
from workers.ground import as_version, asked_of, read_edits
from workers.kinds import edit, fine_tune, flatten
from workers.work import Work

#: Of an edit that was made anew: it answers as it should, it did so before, or it does not.
TOOK, ALREADY_TRUE, FAILED = "took", "already_true", "failed"


@dataclass(frozen=True)
class Replayed:
    """What recipes made.

    Attributes:
        chain: the lineage of the version that the last of them made.
        made: the versions that were made, oldest first.
        edits: for each edit its version and place there, what it says, and its outcome.
        runs: for each recipe its version, the version that it made anew, and what went wrong.
    """

    chain: Sequence[Version]
    made: tuple[VersionManifest, ...]
    edits: list[dict[str, Any]]
    runs: list[dict[str, Any]]


def replay(
    work: Work, chain: Sequence[Version], recipes: Sequence[Version], *, elsewhere: bool = False
) -> Replayed:
    """Run the recipes of versions, in order, on top of the first version of ``chain``.

    A stack that is as deep as one may be is flattened on the way.

    Args:
        elsewhere: on another base: edits that are true there are left out, and one recipe's
            failure does not end the work.

    Raises:
        UnprocessableRequest: a version's recipe cannot run again.
    """
    check_rerun(recipes, "replay")
    made: list[VersionManifest] = []
    edits: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []

    def add(manifest: VersionManifest) -> None:
        nonlocal chain
        made.append(manifest)
        chain = [as_row(work, manifest), *chain]

    for place, version in enumerate(recipes):
        if len(chain[0].manifest.stack) >= work.settings.max_stack:
            add(flatten.flat(work.part(chain, work.claim.job.request, place, len(recipes))))
        asked = read_edits(work, version.manifest.recipe.get("edits"))
        true = _matches(work, chain[0], asked)
        left = [e for e, holds in zip(asked, true, strict=True) if not (elsewhere and holds)]
        manifest, error = None, None
        if left or not asked:
            part = work.part(chain, _request(work, version, left), place, len(recipes))
            try:
                manifest = _rerun(part, version)
                add(manifest)
            except (InvalidRequest, JobFailed) as found:
                if not elsewhere:
                    raise
                error = found.message
        runs.append(_told(version, manifest, error))
        now = _matches(work, chain[0], asked)
        for at, (one, was, holds) in enumerate(zip(asked, true, now, strict=True)):
            outcome = FAILED if not holds else ALREADY_TRUE if was else TOOK
            edits.append({**_said(one), "edit": f"{version.id}.{at}", "outcome": outcome})
    return Replayed(chain, tuple(made), edits, runs)


def as_row(work: Work, manifest: VersionManifest) -> Version:
    """A version that the job has made, as the registry will hold it."""
    return Version(work.claim.job.tenant, manifest, READY, None, time.time())


def _rerun(part: Work, version: Version) -> VersionManifest:
    kinds = {"edit": edit.rerun, "fine_tune": fine_tune.rerun}
    manifest = kinds[version.manifest.recipe["kind"]](part)
    return replace(manifest, recipe={**manifest.recipe, "replays": version.id})


def _request(work: Work, version: Version, edits: Sequence[EditRequest]) -> Mapping[str, Any]:
    """What a job would have been asked that made the version of these edits."""
    recipe = version.manifest.recipe
    if recipe["kind"] == "edit":
        rows = [one.to_json() for one in edits]
        return {**recipe, "edits": work.artifacts.put(canonical_json(rows)) if rows else None}
    steps = (recipe["preprocessing"] or {}).get("steps", [])
    return {**recipe, "preprocessing": steps, "validation": None}


def _matches(work: Work, version: Version, edits: Sequence[EditRequest]) -> list[bool]:
    if not edits:
        return []
    with as_version(work, version) as view:
        return greedy_matches(view, asked_of(edits))


def _told(version: Version, made: VersionManifest | None, error: str | None) -> dict[str, Any]:
    recipe = version.manifest.recipe
    return {
        "version": version.id,
        "kind": recipe["kind"],
        "method": recipe["method"],
        "made": None if made is None else made.id,
        "error": error,
    }


def _said(edit: EditRequest) -> dict[str, Any]:
    return {"prompt": edit.rewrite_prompt, "target_new": edit.target_new}
