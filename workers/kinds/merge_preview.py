"""A preview of a merge: where its versions contradict each other."""

from __future__ import annotations

from editing.merging.conflicts import edit_conflicts
from editing.merging.merge import compare
from registry.results import Result
from workers.merging import parents_of
from workers.work import Work


def perform(work: Work) -> Result:
    """The report is the job's metrics. No version is made."""
    view, parents = parents_of(work)
    conflicts = work.follow(compare(view, [parent.input for parent in parents]))
    report = conflicts.to_json([parent.version.id for parent in parents])
    edits = edit_conflicts({parent.version.id: parent.edits for parent in parents})
    return Result(metrics={"conflicts": {**report, "edits": edits}})
