"""``/v1/merges``."""

from __future__ import annotations

from fastapi import status

from app.jobs.schemas import JobBody
from app.merges.schemas import CreateMerge
from app.merges.submit import check_preview, check_request
from app.strict import Router
from app.submission import SubmissionDep

router = Router(prefix="/v1/merges", tags=["merges"])


@router.post("", status_code=status.HTTP_202_ACCEPTED)
def create_merge(body: CreateMerge, submission: SubmissionDep) -> JobBody:
    """Merge versions of one base into a new version; answers with the job, whose metrics say where
    they contradict each other and which of their edits survived."""
    return submission.once(check_request, body)


@router.post("/preview", status_code=status.HTTP_202_ACCEPTED)
def preview_merge(body: CreateMerge, submission: SubmissionDep) -> JobBody:
    """Say where the versions of a merge contradict each other; no version is made."""
    return submission.once(check_preview, body)
