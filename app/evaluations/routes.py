"""``/v1/evaluations``."""

from __future__ import annotations

from fastapi import status

from app.evaluations.schemas import CreateEvaluation
from app.evaluations.submit import check_request
from app.jobs.schemas import JobBody
from app.strict import Router
from app.submission import SubmissionDep

router = Router(prefix="/v1/evaluations", tags=["evaluations"])


@router.post("", status_code=status.HTTP_202_ACCEPTED)
def create_evaluation(body: CreateEvaluation, submission: SubmissionDep) -> JobBody:
    """Measure a version; the result is in the job's metrics and in a report on the version."""
    return submission.once(check_request, body)
