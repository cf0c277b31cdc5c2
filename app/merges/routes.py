"""``/v1/merges``."""

from __future__ import annotations

from fastapi import APIRouter, Response, status

from app.jobs.schemas import JobBody
from app.merges.schemas import CreateMerge
from app.merges.submit import check_preview, check_request
from app.services import CallerDep, ServicesDep
from app.submission import IdempotencyKey, submit_once

router = APIRouter(prefix="/v1/merges", tags=["merges"])


@router.post("", status_code=status.HTTP_202_ACCEPTED)
def create_merge(
    body: CreateMerge,
    services: ServicesDep,
    caller: CallerDep,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> JobBody:
    """Merge versions of one base into a new version; answers with the job, whose metrics say where
    they contradict each other and which of their edits survived."""
    return submit_once(
        services,
        caller,
        response,
        idempotency_key,
        body,
        lambda: check_request(services, caller, body),
    )


@router.post("/preview", status_code=status.HTTP_202_ACCEPTED)
def preview_merge(
    body: CreateMerge,
    services: ServicesDep,
    caller: CallerDep,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> JobBody:
    """Say where the versions of a merge contradict each other; no version is made."""
    return submit_once(
        services,
        caller,
        response,
        idempotency_key,
        body,
        lambda: check_preview(services, caller, body),
    )
