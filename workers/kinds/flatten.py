"""A flatten: a version's stack as one delta that does the same, to the bit."""

from __future__ import annotations

from typing import Any

from editing.deltas import Delta, flattened
from registry.edits import origins
from registry.errors import UnprocessableRequest
from registry.manifests import Progress, VersionManifest
from registry.results import Result
from registry.versions import reports
from workers.ground import parent_of
from workers.work import Work


def perform(work: Work) -> Result:
    """Put the parent's stack together. Methods' state is kept: later jobs see it as before.

    Raises:
        UnprocessableRequest: there is nothing to flatten, or a gate that replaces a module's output
            has work after it on that module.
    """
    return Result(flat(work), {"flattened": len(work.chain[0].manifest.stack)}, holds=_held(work))


def flat(work: Work) -> VersionManifest:
    """The parent's stack as one delta. Raises as ``perform``."""
    parent, _, stack = parent_of(work)
    if len(stack) < 2:
        raise UnprocessableRequest(
            f"version {parent.id} has {len(stack)} delta(s); there is nothing to flatten"
        )
    work.report(Progress(0, 1, f"putting {len(stack)} deltas together"))
    digest = work.artifacts.put(_file(flattened(stack)))
    return VersionManifest(parent.manifest.base, (digest,), (parent.id,), _recipe(work))


def _file(delta: Delta) -> bytes:
    try:
        return delta.to_bytes()
    except ValueError as error:
        raise UnprocessableRequest(
            f"the stack cannot be one delta: {error}; revert what replaces the output (grace) or"
            " what came after it"
        ) from error


def _recipe(work: Work) -> dict[str, Any]:
    job = work.claim.job
    rows = [
        {
            "delta": origin.delta,
            "versions": [version.id for version in origin.versions],
            "edits": [
                edits
                for version in origin.versions
                if (edits := version.manifest.recipe.get("edits"))
            ],
        }
        for origin in origins(work.chain)
    ]
    return {
        "kind": "flatten",
        "job": job.id,
        "origins": rows,
        "author": job.actor,
        "message": job.request.get("message"),
    }


def _held(work: Work) -> str | None:
    """What was last said of the parent's live edits: of what computes the same it is as true."""
    job, parent = work.claim.job, work.chain[0]
    with work.database.read() as connection:
        told = [report.get("holds") for report in reports(connection, job.tenant, parent.id)]
    return next((digest for digest in reversed(told) if digest), None)
