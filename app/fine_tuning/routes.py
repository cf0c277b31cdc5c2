"""``/v1/fine_tuning/jobs``."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Query, Request, Response
from sqlalchemy import Connection

from app.fine_tuning.plot import draw
from app.fine_tuning.schemas import (
    CheckpointBody,
    CreateFineTuning,
    EventBody,
    FineTuningBody,
    checkpoint_body,
    event_body,
    fine_tuning_body,
)
from app.fine_tuning.submit import check_request
from app.schemas import Limit, ListOf, Name, unsupported
from app.services import Caller, CallerDep, ServicesDep
from app.strict import Router
from app.submission import SubmissionDep
from registry import jobs
from registry.checkpoints import list_checkpoints
from registry.curves import curves
from registry.errors import NotFound
from registry.jobs import Job

router = Router(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])
KIND = "fine_tune"
PLOT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/svg+xml": {}}, "description": "The curves."}
}
After = Annotated[str | None, Query(max_length=64, description="The last id of the page before.")]
AfterEvent = Annotated[
    str | None,
    Query(pattern="^(ftevent-)?[0-9]{1,18}$", description="The last id of the page before."),
]


@router.post("")
def create_job(
    body: CreateFineTuning,
    services: ServicesDep,
    caller: CallerDep,
    response: Response,
    submission: SubmissionDep,
) -> FineTuningBody:
    """Tune a version on the rows of a file; what comes of it is another version."""
    made = submission.once(check_request, body)
    response.headers["Location"] = f"{router.prefix}/{made.id}"
    return get_job(made.id, services, caller)


@router.get("")
def list_jobs(
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    after: After = None,
    limit: Limit = 20,
) -> ListOf[FineTuningBody]:
    """Fine-tuning jobs, newest first."""
    for name in request.query_params:
        if name.partition("[")[0] == "metadata":
            raise unsupported("metadata")
    with services.database.read() as connection:
        page = jobs.list_jobs(connection, caller.tenant, kind=KIND, after=after, limit=limit)
        data = [fine_tuning_body(connection, job) for job in page.items]
    return ListOf(data=data, has_more=page.has_more)


@router.get("/{job_id}")
def get_job(job_id: Name, services: ServicesDep, caller: CallerDep) -> FineTuningBody:
    """One job: its status, and the version that it made."""
    with services.database.read() as connection:
        return fine_tuning_body(connection, _job(connection, caller, job_id))


@router.get("/{job_id}/events")
def list_events(
    job_id: Name,
    services: ServicesDep,
    caller: CallerDep,
    after: AfterEvent = None,
    limit: Limit = 20,
) -> ListOf[EventBody]:
    """What happened to a job, newest first: messages, and metrics of its steps."""
    before = None if after is None else int(after.removeprefix("ftevent-"))
    with services.database.read() as connection:
        job = _job(connection, caller, job_id)
        page = jobs.latest_events(connection, job.id, before=before, limit=limit)
    return ListOf(data=[event_body(event) for event in page.items], has_more=page.has_more)


@router.get("/{job_id}/plot", response_class=Response, responses=PLOT)
def get_plot(job_id: Name, services: ServicesDep, caller: CallerDep) -> Response:
    """Loss, accuracy and learning rate by step as an SVG image, also while the job runs."""
    with services.database.read() as connection:
        job = _job(connection, caller, job_id)
        steps = curves(connection, job.id)
    return Response(
        draw(steps, f"{job.request['suffix'] or job.request['method']} ({job.id}, {job.status})"),
        media_type="image/svg+xml",
        headers={
            "Content-Security-Policy": "default-src 'none'",
            "X-Content-Type-Options": "nosniff",
        },
    )


@router.get("/{job_id}/checkpoints")
def get_checkpoints(
    job_id: Name,
    services: ServicesDep,
    caller: CallerDep,
    after: After = None,
    limit: Limit = 10,
) -> ListOf[CheckpointBody]:
    """The versions that a job made on its way, newest first; each can be served."""
    with services.database.read() as connection:
        job = _job(connection, caller, job_id)
        found = [c for c in reversed(list_checkpoints(connection, job.id)) if c.version_id]
    places = [place for place, checkpoint in enumerate(found) if checkpoint.id == after]
    if after is not None and not places:
        raise NotFound(f"checkpoint {after!r} does not exist", param="after")
    rest = found[places[0] + 1 :] if places else found
    return ListOf(data=[checkpoint_body(c) for c in rest[:limit]], has_more=len(rest) > limit)


@router.post("/{job_id}/cancel")
def cancel_job(job_id: Name, services: ServicesDep, caller: CallerDep) -> FineTuningBody:
    """Cancel a queued or paused job at once; ask a running one to stop at its next step."""
    with services.database.write() as connection:
        _job(connection, caller, job_id)
        job = jobs.cancel_job(connection, caller.tenant, job_id, actor=caller.actor)
        return fine_tuning_body(connection, job)


@router.post("/{job_id}/pause")
def pause_job(job_id: Name, services: ServicesDep, caller: CallerDep) -> FineTuningBody:
    """Pause a queued job at once; ask a running one to keep its state and stop."""
    with services.database.write() as connection:
        _job(connection, caller, job_id)
        job = jobs.pause_job(connection, caller.tenant, job_id, actor=caller.actor)
        return fine_tuning_body(connection, job)


@router.post("/{job_id}/resume")
def resume_job(job_id: Name, services: ServicesDep, caller: CallerDep) -> FineTuningBody:
    """Queue a paused job again; it goes on from where it stood."""
    with services.database.write() as connection:
        _job(connection, caller, job_id)
        job = jobs.resume_job(connection, caller.tenant, job_id, actor=caller.actor)
        return fine_tuning_body(connection, job)


def _job(connection: Connection, caller: Caller, job_id: str) -> Job:
    job = jobs.get_job(connection, caller.tenant, job_id)
    if job.kind != KIND:
        raise NotFound(
            f"job {job_id!r} is of kind {job.kind!r}; GET /v1/jobs/{job_id} shows it",
            code="job_not_found",
        )
    return job
