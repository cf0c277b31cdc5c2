"""A preview of preprocessing that asks a version: the first rows, before and after."""

from __future__ import annotations

from editing.deltas import compose
from registry.manifests import Progress
from registry.results import Result
from workers.ground import parent_of
from workers.preprocessing import preview_rows, read_steps
from workers.work import Work


def perform(work: Work) -> Result:
    """The preview is in the job's metrics. No version is made."""
    request = work.claim.job.request
    _, view, stack = parent_of(work)
    work.report(Progress(0, 0, "preprocessing the first rows"))
    rows = work.artifacts.rows(request["rows"])
    with view.with_effects(compose(delta.effects for delta in stack)):
        found = preview_rows(read_steps(request), rows, request["limit"], view)
    work.models.check_untouched(work.claim.job.base)
    return Result(metrics=found)
