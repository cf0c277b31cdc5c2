"""``/v1/edits``."""

from __future__ import annotations

from fastapi import status

from app.edits.schemas import CreateEdit
from app.edits.submit import check_request
from app.jobs.schemas import JobBody
from app.strict import Router
from app.submission import SubmissionDep

router = Router(prefix="/v1/edits", tags=["edits"])


@router.post("", status_code=status.HTTP_202_ACCEPTED)
def create_edit(body: CreateEdit, submission: SubmissionDep) -> JobBody:
    """Take edits of an endpoint (one job after another) or of a version; answers with the job."""
    return submission.once(check_request, body)
