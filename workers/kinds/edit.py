"""An edit: base + the parent's stack -> method -> delta -> metrics -> guards -> artifact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from editing.deltas import Delta, compose
from editing.guards import PERPLEXITY_LIMIT, perplexity_guard
from editing.methods import METHODS
from editing.metrics import measure
from registry.attempts import Result
from registry.errors import JobFailed
from registry.manifests import EditRequest, Progress, VersionManifest, canonical_json
from workers.kinds.prepare import load_resources
from workers.recipes import check_edit
from workers.work import Work


def perform(work: Work) -> Result:
    """Apply the request's edits on top of the parent and save what they change as one delta."""
    job, parent = work.claim.job, work.claim.parent
    if parent is None:
        raise JobFailed(f"job {job.id} names neither endpoint nor parent")
    view = work.models.view(job.base)
    if view.base.ref != parent.manifest.base:
        raise JobFailed(
            f"version {parent.id} stands on base {parent.manifest.base.digest[:12]}…, this worker"
            f" has {view.base.digest[:12]}… under the name {job.base!r}",
            code="base_not_loaded",
        )
    recipe = check_edit(view.base, job.request["method"], job.request["hyperparameters"])
    resources = load_resources(work, recipe.resources)
    edits = [EditRequest.from_json(edit) for edit in job.request["edits"]]
    stack = [Delta.from_bytes(work.artifacts.get(digest)) for digest in parent.manifest.stack]
    with view.with_effects(compose(delta.effects for delta in stack)):
        work.report(Progress(0, 0, "measuring before"))
        before = measure(view, edits, resources.references)
        apply = METHODS[recipe.method].load()
        delta: Delta = work.follow(apply(view, edits, recipe.hyperparameters, resources))
        work.report(Progress(len(edits), len(edits), "measuring after"))
        with view.with_effects(delta.effects):
            after = measure(view, edits, resources.references, before)
    work.models.check_untouched(job.base)
    limit = job.request["guards"].get("perplexity") or PERPLEXITY_LIMIT
    guard = perplexity_guard(before.metrics, after.metrics, limit)
    manifest = VersionManifest(
        base=parent.manifest.base,
        stack=(*parent.manifest.stack, work.artifacts.put(delta.to_bytes())),
        parents=(parent.id,),
        recipe=_recipe(work, edits),
    )
    metrics = {"before": dict(before.metrics), "after": dict(after.metrics)}
    return Result(manifest, metrics, (guard,))


def _recipe(work: Work, edits: Sequence[EditRequest]) -> dict[str, Any]:
    """How the version came to be; the edits themselves are an artifact, named by digest."""
    job = work.claim.job
    return {
        "kind": "edit",
        "job": job.id,
        "method": job.request["method"],
        "hyperparameters": job.request["hyperparameters"],
        "edits": work.artifacts.put(canonical_json([edit.to_json() for edit in edits])),
        "edit_count": len(edits),
        "author": job.actor,
        "message": job.request.get("message"),
    }
