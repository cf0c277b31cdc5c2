"""A job as REST shows it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field
from sqlalchemy import Connection

from registry import attempts, files, jobs
from registry.jobs import Job

Status = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]


class ProgressBody(BaseModel):
    done: int
    total: int = Field(description="0 until it is known.")
    message: str


class AttemptBody(BaseModel):
    attempt: int
    worker: str
    outcome: str
    started_at: int
    ended_at: int | None


class GuardBody(BaseModel):
    name: str
    result: str = Field(description="passed, failed or, without data, skipped")
    value: float | None
    limit: float | None
    before: float | None


class JobBody(BaseModel):
    id: str
    object: Literal["job"] = "job"
    kind: str
    status: Status
    base: str
    endpoint: str | None
    parent: str | None
    after: str | None = Field(description="The job that this one waits for.")
    progress: ProgressBody
    position: int | None = Field(description="Unfinished jobs before this one, while queued.")
    version: str | None = Field(description="The version it made.")
    activated: bool = Field(description="Whether the endpoint was moved to the version.")
    reason: str | None
    metrics: dict[str, Any] | None
    guards: list[GuardBody]
    warnings: list[str] = Field(description="What was noticed of the request when it was taken.")
    result_files: list[str] = Field(description="Files that it left to be downloaded.")
    error: dict[str, Any] | None
    attempts: list[AttemptBody]
    created_at: int
    started_at: int | None
    finished_at: int | None


def job_body(connection: Connection, job: Job) -> JobBody:
    return JobBody(
        id=job.id,
        kind=job.kind,
        status=job.status,
        base=job.base,
        endpoint=job.endpoint,
        parent=job.parent,
        after=job.after,
        progress=ProgressBody(done=job.done, total=job.total, message=job.message),
        position=jobs.position(connection, job),
        version=job.version_id,
        activated=job.activated,
        reason=job.reason,
        metrics=None if job.metrics is None else dict(job.metrics),
        guards=[GuardBody(**guard) for guard in job.guards or ()],
        warnings=list(job.request.get("warnings") or ()),
        result_files=files.result_files(connection, job),
        error=None if job.error is None else dict(job.error),
        attempts=[AttemptBody(**attempt) for attempt in attempts.attempts(connection, job.id)],
        created_at=int(job.created_at),
        started_at=None if job.started_at is None else int(job.started_at),
        finished_at=None if job.finished_at is None else int(job.finished_at),
    )
