"""What jobs that rebuild a version have in common: the result measured, judged and put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from editing.deltas import compose
from editing.guards import judge, read
from editing.metrics.norm import update_ratio
from registry.edits import edited
from registry.manifests import EditRequest, Progress, VersionManifest, canonical_json, finite
from registry.results import Result
from registry.versions import Version
from telemetry import traces
from workers.evidence import limits_of, material_of
from workers.ground import as_version, deltas_of, holds_of
from workers.work import Work


def measured(
    work: Work,
    chain: Sequence[Version],
    made: Sequence[VersionManifest],
    edits: Sequence[EditRequest],
    references: Sequence[str],
    report: Mapping[str, Any],
) -> Result:
    """The result of a job: its last version under the guards, every live edit asked again.

    Args:
        chain: the last version's lineage.
        made: the versions that the job made, the last one last.
        edits: that should hold; the guard ``efficacy`` asks for them.
        references: texts, for guards whose request names none.
        report: goes to the job's metrics beside ``before`` and ``after``.
    """
    head, parent = chain[0], work.chain[0]
    request = work.claim.job.request
    work.report(Progress(len(made), len(made), "measuring"))
    base = work.models.view(work.claim.job.base).base
    material = material_of(work, base, edits, references, request["guards"])
    with traces.span("metrics"), as_version(work, parent) as view:
        before = read(view, material)
    with traces.span("guards"), as_version(work, head) as view:
        after = read(view, material)
        holds = holds_of(work, view, chain)
    changed = deltas_of(work, view, _changed(parent, head))
    norm = update_ratio(view, compose(delta.effects for delta in changed))
    work.models.check_untouched(work.claim.job.base)
    asked = [value for version, _ in edited(chain) for value in holds[version.id]]
    metrics = {
        "before": finite(before.metrics),
        "after": finite(after.metrics),
        "live_edits": len(asked),
        "holding_edits": sum(asked),
        **report,
    }
    return Result(
        made[-1],
        metrics,
        judge(material, before, after, norm, limits_of(work.settings, request["guards"])),
        work.artifacts.put(canonical_json(holds)),
        steps=made[:-1],
    )


def _changed(before: Version, after: Version) -> list[str]:
    """The deltas of which one stack has others than the other: what was added, else removed."""
    was, now = before.manifest.stack, after.manifest.stack
    return [d for d in now if d not in was] or [d for d in was if d not in now]
