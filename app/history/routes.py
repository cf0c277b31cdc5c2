"""``/v1/versions/{id}/diff``, ``/flatten``, ``/revert`` and ``/v1/endpoints/{name}/replay``."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Response, status
from pydantic import BaseModel, SerializeAsAny

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
from app.submission import IdempotencyKey, submit_once
from registry import versions

router = APIRouter(prefix="/v1", tags=["history"])


class _On(BaseModel):
    """A request with what its path names: by both an Idempotency-Key knows it again."""

    path: str
    body: SerializeAsAny[BaseModel]


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
def diff_on_file(
    version_id: VersionId,
    body: DiffFile,
    services: ServicesDep,
    caller: CallerDep,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> JobBody:
    """Which prompts of a file two versions answer differently; the job's metrics list them."""
    return submit_once(
        services,
        caller,
        response,
        idempotency_key,
        _On(path=version_id, body=body),
        lambda: check_diff(services, caller, version_id, body),
    )


@router.post("/versions/{version_id}/flatten", status_code=status.HTTP_202_ACCEPTED)
def flatten(
    version_id: VersionId,
    services: ServicesDep,
    caller: CallerDep,
    response: Response,
    body: Flatten | None = None,
    idempotency_key: IdempotencyKey = None,
) -> JobBody:
    """Make a version whose one delta does what this one's stack does."""
    asked = body or Flatten()
    return submit_once(
        services,
        caller,
        response,
        idempotency_key,
        _On(path=version_id, body=asked),
        lambda: check_flatten(services, caller, version_id, asked),
    )


@router.post("/versions/{version_id}/revert", status_code=status.HTTP_202_ACCEPTED)
def revert(
    version_id: VersionId,
    body: Revert,
    services: ServicesDep,
    caller: CallerDep,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> JobBody:
    """Take a delta out of a version's stack, wherever it is; what remains is measured again."""
    return submit_once(
        services,
        caller,
        response,
        idempotency_key,
        _On(path=version_id, body=body),
        lambda: check_revert(services, caller, version_id, body),
    )


@router.post("/endpoints/{name}/replay", status_code=status.HTTP_202_ACCEPTED)
def replay(
    name: Name,
    body: Replay,
    services: ServicesDep,
    caller: CallerDep,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> JobBody:
    """Run an endpoint's live recipes again, in order, on another base; report edit by edit."""
    return submit_once(
        services,
        caller,
        response,
        idempotency_key,
        _On(path=name, body=body),
        lambda: check_replay(services, caller, name, body),
    )
