"""A diff on a file: which of its prompts two versions answer differently."""

from __future__ import annotations

from typing import Any

from editing.metrics.targets import begins_with, greedy_answers
from registry.manifests import EditRequest, Progress
from registry.results import Result
from registry.versions import Version, get_kept_version
from workers.ground import as_version, asked_of
from workers.work import Work

#: Most changed rows that a job's metrics list.
LISTED = 1000


def perform(work: Work) -> Result:
    """Ask the parent and the request's other version. No version is made."""
    job = work.claim.job
    with work.database.read() as connection:
        against = get_kept_version(connection, job.tenant, job.request["against"])
    asked = _asked(job.request["purpose"], list(work.artifacts.rows(job.request["rows"])))
    both = work.chain[0], against
    answers = [_answers(work, version, asked, n) for n, version in enumerate(both)]
    for name in {version.manifest.base.name for version in both}:
        work.models.check_untouched(name)
    rows = [_row(*said) for said in zip(asked, *answers, strict=True)]
    changed = [row for row in rows if row["version"] != row["against"]]
    return Result(
        metrics={
            "rows": len(rows),
            "changed": len(changed),
            **{name: _count(rows, name) for name in ("version_right", "against_right")},
            "data": changed[:LISTED],
        }
    )


def _asked(purpose: str, rows: list[Any]) -> list[tuple[str, str]]:
    """Prompts, each with its target; empty where a text has none."""
    if purpose == "edits":
        return asked_of(EditRequest.from_json(row) for row in rows)
    return [(row, "") if purpose == "texts" else (row["prompt"], row["target"]) for row in rows]


def _answers(work: Work, version: Version, asked: list[tuple[str, str]], place: int) -> list[str]:
    work.report(Progress(place, 2, f"asking version {version.id}"))
    with as_version(work, version) as view:
        return greedy_answers(view, asked)


def _row(asked: tuple[str, str], version: str, against: str) -> dict[str, Any]:
    prompt, target = asked
    row: dict[str, Any] = {"prompt": prompt, "version": version, "against": against}
    if target:
        row |= {"target": target, "version_right": begins_with(version, target)}
        row["against_right"] = begins_with(against, target)
    return row


def _count(rows: list[dict[str, Any]], name: str) -> int:
    return sum(row.get(name, False) for row in rows)
