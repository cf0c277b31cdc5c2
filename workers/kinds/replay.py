"""A replay onto another base: an endpoint's live recipes, run again on the head of another."""

from __future__ import annotations

from collections import Counter
from typing import Any

from registry.errors import JobFailed
from registry.history import recipes
from registry.results import Result
from registry.versions import get_version, lineage
from workers.change import measured
from workers.ground import read_edits
from workers.kinds.prepare import load_resources
from workers.recipes import TEXTS
from workers.replaying import ALREADY_TRUE, FAILED, TOOK, replay
from workers.work import Work


def perform(work: Work) -> Result:
    """Run the recipes of the request's version on the parent; report edit by edit.

    Raises:
        JobFailed: nothing had to be made: every edit is true there, or each failed.
    """
    job = work.claim.job
    with work.database.read() as connection:
        source = get_version(connection, job.tenant, job.request["version"])
        chain = lineage(connection, job.tenant, source.id)
    again = recipes(chain, "name")
    edits = [e for v in again for e in read_edits(work, v.manifest.recipe.get("edits"))]
    references = load_resources(work, frozenset({TEXTS})).references
    done = replay(work, work.chain, again, elsewhere=True)
    counts = Counter(row["outcome"] for row in done.edits)
    report: dict[str, Any] = {
        **{outcome: counts[outcome] for outcome in (TOOK, ALREADY_TRUE, FAILED)},
        "edits": done.edits,
        "runs": done.runs,
    }
    if not done.made:
        work.models.check_untouched(job.base)
        failed = [run for run in done.runs if run["error"]]
        if failed:
            raise JobFailed(
                f"none of {len(done.runs)} recipes could run on base {job.base!r}; the first:"
                f" {failed[0]['error']}"
            )
        return Result(metrics=report)
    return measured(work, done.chain, done.made, edits, references, report)
