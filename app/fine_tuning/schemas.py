"""A fine-tuning job as REST takes and shows it, in OpenAI's shapes."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from sqlalchemy import Connection

from app.edits.schemas import Guards
from app.schemas import Message, Name, Request
from registry.checkpoints import Checkpoint
from registry.curves import first_measured
from registry.files import result_files
from registry.jobs import RUNNING, Event, Job
from workers.preprocessing import Preprocessing

Status = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
METADATA_KEYS, METADATA_KEY, METADATA_VALUE = 16, 64, 512


class Method(BaseModel):
    """``{"type": "lora", "lora": {"hyperparameters": {…}}}``; OpenAI's ``supervised`` is LoRA.

    Beside the hyperparameters may stand ``booster`` where a method learns from examples, and
    ``reward`` where it learns from prompts.
    """

    model_config = ConfigDict(extra="allow")

    type: Annotated[str, Field(min_length=1, max_length=64)] = "supervised"


class CreateFineTuning(Request):
    model: Name = Field(description="An endpoint, a version or a base to tune from.")
    training_file: Name = Field(description="A file of purpose fine-tune.")
    validation_file: Name | None = Field(None, description="Another, which is only measured.")
    method: Method | None = None
    hyperparameters: dict[str, Any] | None = Field(
        None, description="Those of the method, where it does not name them itself."
    )
    preprocessing: list[Preprocessing] = Field(
        default=[], max_length=8, description="What is made of the rows before training, in turn."
    )
    seed: int | None = Field(None, ge=0, lt=2**31, description="By default 0.")
    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    metadata: dict[str, str] | None = None
    integrations: list[Any] | None = Field(None, max_length=0, description="None are offered.")
    message: Message | None = None
    guards: Guards = Field(default_factory=Guards)

    @field_validator("metadata")
    @classmethod
    def _small(cls, found: dict[str, str] | None) -> dict[str, str] | None:
        if found is None:
            return None
        too_long = any(len(k) > METADATA_KEY or len(v) > METADATA_VALUE for k, v in found.items())
        if len(found) > METADATA_KEYS or too_long:
            raise ValueError(
                f"holds at most {METADATA_KEYS} pairs, keys of {METADATA_KEY} and values of"
                f" {METADATA_VALUE} characters"
            )
        return found


class ErrorBody(BaseModel):
    code: str | None
    message: str
    param: str | None


class FineTuningBody(BaseModel):
    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    model: str
    fine_tuned_model: str | None = Field(description="The version it made.")
    organization_id: str
    status: Status
    training_file: str
    validation_file: str | None
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    preprocessing: list[dict[str, Any]]
    trained_tokens: int | None
    result_files: list[str] = Field(description="Its curves, as comma-separated values.")
    error: ErrorBody | None
    seed: int
    estimated_finish: int | None
    suffix: str | None
    metadata: dict[str, str] | None
    integrations: list[Any] = Field(default_factory=list)
    metrics: dict[str, Any] | None


class EventBody(BaseModel):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class CheckpointBody(BaseModel):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, Any]


def fine_tuning_body(connection: Connection, job: Job) -> FineTuningBody:
    request = job.request
    error = None
    if job.error is not None:
        named = {name: job.error.get(name) for name in ("code", "param")}
        error = ErrorBody(message=str(job.error.get("message")), **named)
    return FineTuningBody(
        id=job.id,
        created_at=int(job.created_at),
        finished_at=None if job.finished_at is None else int(job.finished_at),
        model=request["model"],
        fine_tuned_model=job.version_id if job.status == "succeeded" else None,
        organization_id=job.tenant,
        status=job.status,
        training_file=request["training_file"],
        validation_file=request["validation_file"],
        hyperparameters=request["hyperparameters"],
        method={
            "type": request["method"],
            request["method"]: {
                "hyperparameters": request["hyperparameters"],
                **request["options"],
            },
        },
        preprocessing=request["preprocessing"],
        trained_tokens=(job.metrics or {}).get("trained_tokens"),
        result_files=result_files(connection, job),
        error=error,
        seed=request["seed"],
        estimated_finish=_estimate(connection, job),
        suffix=request["suffix"],
        metadata=request["metadata"],
        metrics=None if job.metrics is None else dict(job.metrics),
    )


def event_body(event: Event) -> EventBody:
    """A registry's event in OpenAI's shape: progress is metrics, all else is a message."""
    if event.type == "progress" and event.data.get("metrics"):
        data = {"step": event.data["done"], "total_steps": event.data["total"]}
        kind: Literal["message", "metrics"] = "metrics"
        data |= event.data["metrics"]
    else:
        kind, data = "message", dict(event.data)
    error = event.data.get("error")
    return EventBody(
        id=f"ftevent-{event.seq}",
        created_at=int(event.created_at),
        level="error" if error else "info",
        message=_told(event),
        type=kind,
        data=data,
    )


def checkpoint_body(checkpoint: Checkpoint) -> CheckpointBody:
    return CheckpointBody(
        id=checkpoint.id,
        created_at=int(checkpoint.created_at),
        fine_tuned_model_checkpoint=checkpoint.version_id or "",
        fine_tuning_job_id=checkpoint.job_id,
        step_number=checkpoint.step,
        metrics={"step": checkpoint.step, **checkpoint.metrics},
    )


def _told(event: Event) -> str:
    if event.type == "status":
        error = event.data.get("error") or {}
        detail = error.get("message") or event.data.get("reason")
        status = str(event.data["status"])
        return f"{status}: {detail}" if detail else status
    return str(event.data.get("message", event.type))


def _estimate(connection: Connection, job: Job) -> int | None:
    """When a job ends that goes on as since its attempt's first step; None before the second."""
    first = first_measured(connection, job.id) if job.status == RUNNING else None
    if first is None or job.done <= first.data["done"]:
        return None
    now = time.time()
    each = (now - first.created_at) / (job.done - first.data["done"])
    return int(now + each * (job.total - job.done))
