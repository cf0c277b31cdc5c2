"""``/v1/edits``."""

from __future__ import annotations

from fastapi import APIRouter, Response, status

from app.edits.schemas import CreateEdit
from app.edits.submit import check_request
from app.jobs.schemas import JobBody
from app.services import CallerDep, ServicesDep
from app.submission import IdempotencyKey, submit_once

router = APIRouter(prefix="/v1/edits", tags=["edits"])


@router.post("", status_code=status.HTTP_202_ACCEPTED)
def create_edit(
    body: CreateEdit,
    services: ServicesDep,
    caller: CallerDep,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> JobBody:
    """Take edits of an endpoint (one job after another) or of a version; answers with the job."""
    return submit_once(
        services,
        caller,
        response,
        idempotency_key,
        body,
        lambda: check_request(services, caller, body),
    )
