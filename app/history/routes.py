"""``/v1/versions/{id}/diff``, ``/flatten``, ``/revert`` and ``/v1/endpoints/{name}/replay``."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query, status

from app.history.diff import diff
from app.history.schemas import DiffBody, DiffFile, Flatten, Replay, Revert, VersionName
from app.history.submit import (
    check_diff,
    check_flatten,
    check_replay,
    check_revert,
    other_version,
)
from app.jobs.schemas import JobBody
from app.schemas import Name
from app.services import CallerDep, ServicesDep
from app.strict import Router
from app.submission import SubmissionDep
from registry import versions

router = Router(prefix="/v1", tags=["history"])


VersionId = Annotated[str, Path(pattern=r"^ver_[0-9a-f]{40}$")]


@router.get("/versions/{version_id}/diff")
def get_diff(
    version_id: VersionId,
    against: Annotated[VersionName, Query(description="The version to compare with.")],
    services: ServicesDep,
    caller: CallerDep,
) -> DiffBody:
    """What two versions share, and which deltas, modules and live edits only one of them has."""
    with services.database.read() as connection:
        version = versions.get_kept_version(connection, caller.tenant, version_id)
        other = other_version(connection, caller, against)
        chains = [versions.lineage(connection, caller.tenant, v.id) for v in (version, other)]
    return diff(services, chains[0], chains[1])


@router.post("/versions/{version_id}/diff", status_code=status.HTTP_202_ACCEPTED)
def diff_on_file(version_id: VersionId, body: DiffFile, submission: SubmissionDep) -> JobBody:
    """Which prompts of a file two versions answer differently; the job's metrics list them."""
    return submission.once(check_diff, version_id, body)


@router.post("/versions/{version_id}/flatten", status_code=status.HTTP_202_ACCEPTED)
def flatten(
    version_id: VersionId, submission: SubmissionDep, body: Flatten | None = None
) -> JobBody:
    """Make a version whose one delta does what this one's stack does."""
    return submission.once(check_flatten, version_id, body or Flatten())


@router.post("/versions/{version_id}/revert", status_code=status.HTTP_202_ACCEPTED)
def revert(version_id: VersionId, body: Revert, submission: SubmissionDep) -> JobBody:
    """Take a delta out of a version's stack, wherever it is; what remains is measured again."""
    return submission.once(check_revert, version_id, body)


@router.post("/endpoints/{name}/replay", status_code=status.HTTP_202_ACCEPTED)
def replay(name: Name, body: Replay, submission: SubmissionDep) -> JobBody:
    """Run an endpoint's live recipes again, in order, on another base; report edit by edit."""
    return submission.once(check_replay, name, body)
