"""``/v1/edits``."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Response, status
from sqlalchemy import Connection

from app.edits.schemas import CreateEdit
from app.jobs.schemas import JobBody, job_body
from app.services import Caller, CallerDep, Services, ServicesDep
from registry import endpoints, jobs, versions
from registry.bases import Base, base_of
from registry.errors import Conflict, NotFound, UnprocessableRequest
from registry.jobs import Job
from registry.manifests import canonical_json, sha256
from registry.resources import find_resources
from registry.versions import Version
from workers.recipes import check_edit, text_source

router = APIRouter(prefix="/v1/edits", tags=["edits"])


@router.post("", status_code=status.HTTP_202_ACCEPTED)
def create_edit(
    body: CreateEdit,
    services: ServicesDep,
    caller: CallerDep,
    response: Response,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=255,
            description="The same key within 24 h answers with the same job.",
        ),
    ] = None,
) -> JobBody:
    """Take edits of an endpoint (one job after another) or of a version; answers with the job."""
    limit = services.settings.max_edits
    if len(body.edits) > limit:
        raise UnprocessableRequest(
            f"edits holds {len(body.edits)} edits; the limit is {limit} (ERRATA_MAX_EDITS)",
            param="edits",
        )
    digest = sha256(canonical_json(body.model_dump()))
    with services.database.write() as connection:
        job = None
        if idempotency_key is not None:
            job = jobs.find_idempotent(connection, caller.tenant, idempotency_key, digest)
        if job is None:
            job = _submit(connection, services, caller, body)
            if idempotency_key is not None:
                jobs.remember_idempotent(connection, caller.tenant, idempotency_key, digest, job.id)
        answer = job_body(connection, job)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return answer


def _submit(connection: Connection, services: Services, caller: Caller, body: CreateEdit) -> Job:
    parent = _parent(connection, caller, body)
    base = base_of(services.bases, parent.id, parent.manifest.base)
    recipe = check_edit(base, body.method, body.hyperparameters)
    source, _ = text_source(services.settings, base)
    missing = recipe.resources - set(find_resources(connection, base.digest, source))
    after = _prepare(connection, caller, base, set(missing)) if missing else None
    request: dict[str, Any] = body.model_dump(mode="json")
    request["hyperparameters"] = recipe.hyperparameters.model_dump(mode="json")
    return jobs.submit_job(
        connection,
        caller.tenant,
        "edit",
        base=base.name,
        request=request,
        actor=caller.actor,
        endpoint=body.endpoint,
        parent=body.parent,
        after=None if after is None else after.id,
    )


def _prepare(connection: Connection, caller: Caller, base: Base, missing: set[str]) -> Job:
    """The job that makes what is missing: one under way already, or a new one."""
    found = jobs.unfinished_like(connection, "prepare", base.name, missing)
    return found or jobs.submit_job(
        connection,
        caller.tenant,
        "prepare",
        base=base.name,
        request={"resources": sorted(missing)},
        actor=caller.actor,
    )


def _parent(connection: Connection, caller: Caller, body: CreateEdit) -> Version:
    if body.parent is not None:
        return versions.get_ready_version(connection, caller.tenant, body.parent)
    if body.endpoint is None:
        raise UnprocessableRequest("give exactly one of endpoint and parent")
    try:
        endpoint = endpoints.get_endpoint(connection, caller.tenant, body.endpoint)
        head = endpoint.head
    except NotFound as error:
        raise NotFound(error.message, param="endpoint", code=error.code) from None
    except Conflict as error:
        raise UnprocessableRequest(error.message, param="endpoint", code=error.code) from None
    return versions.get_ready_version(connection, caller.tenant, head)
