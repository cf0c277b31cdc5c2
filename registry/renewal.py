"""What a job made is put again right before rows name it: most of it was put long before."""

from __future__ import annotations

from collections.abc import Sequence

from registry.artifacts import ArtifactStore
from registry.attempts import Claim
from registry.errors import NotFound, StoreUnavailable
from registry.garbage import digests_in
from registry.manifests import VersionManifest
from registry.results import Result


def renew(artifacts: ArtifactStore, claim: Claim, result: Result, grace: float) -> None:
    """Make what a result names young, so that no collector deletes it before its rows are there.

    What the attempt began with is left alone: rows have named that all the while.

    Args:
        grace: seconds that a collector leaves what was put last; half of them are left to commit.

    Raises:
        StoreUnavailable: one is gone, since the attempt took longer; another may be faster.
    """
    made = [*result.steps, *([] if result.manifest is None else [result.manifest])]
    needed = _needed(made, result)
    named = needed | digests_in([one.recipe for one in (*result.ancestors, *made)])
    parent = None if claim.parent is None else claim.parent.manifest
    named -= digests_in([claim.job.request, parent and parent.to_json()])
    if not named:
        return
    before = artifacts.now() - grace / 2
    for digest in sorted(named):
        try:
            artifacts.renew(digest, before)
        except NotFound:
            if digest in needed:
                raise StoreUnavailable(
                    f"artifact {digest}, which the attempt had put, was collected before its end:"
                    " let ERRATA_GC_GRACE_SECONDS be longer than a job takes"
                ) from None


def _needed(made: Sequence[VersionManifest], result: Result) -> frozenset[str]:
    """Without these it would not be whole; what comes from elsewhere may lack edits."""
    needed = {digest for one in made for digest in one.stack}
    if result.signatures is None:
        needed |= {one.recipe["edits"] for one in made if one.recipe.get("edits")}
    if result.holds is not None:
        needed.add(result.holds)
    if result.file is not None:
        needed.add(result.file.content)
    return frozenset(needed)
