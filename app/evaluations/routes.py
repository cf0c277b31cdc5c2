"""``/v1/evaluations``."""

from __future__ import annotations

from fastapi import APIRouter, Response, status

from app.evaluations.schemas import CreateEvaluation
from app.evaluations.submit import check_request
from app.jobs.schemas import JobBody
from app.services import CallerDep, ServicesDep
from app.submission import IdempotencyKey, submit_once

router = APIRouter(prefix="/v1/evaluations", tags=["evaluations"])


@router.post("", status_code=status.HTTP_202_ACCEPTED)
def create_evaluation(
    body: CreateEvaluation,
    services: ServicesDep,
    caller: CallerDep,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> JobBody:
    """Measure a version; the result is in the job's metrics and in a report on the version."""
    return submit_once(
        services,
        caller,
        response,
        idempotency_key,
        body,
        lambda: check_request(services, caller, body),
    )
