"""``/v1/versions``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Response
from fastapi import status as http

from app.evaluations.schemas import CreateEvaluation, Editability
from app.evaluations.submit import check_request
from app.jobs.schemas import JobBody
from app.schemas import Limit, ListOf, Name
from app.services import CallerDep, ServicesDep
from app.submission import IdempotencyKey, submit_once
from app.versions.graph import DOT, as_dot, edges
from app.versions.schemas import Lineage, VersionBody, version_body
from registry import versions

router = APIRouter(prefix="/v1/versions", tags=["versions"])
VersionId = Annotated[str, Path(pattern=r"^ver_[0-9a-f]{40}$")]


@router.get("")
def list_versions(
    services: ServicesDep,
    caller: CallerDep,
    base: Annotated[Name | None, Query()] = None,
    status: Literal["ready", "rejected", "deleted"] | None = None,
    after: Annotated[str | None, Query(description="The last id of the page before.")] = None,
    limit: Limit = 20,
) -> ListOf[VersionBody]:
    """Versions, newest first."""
    with services.database.read() as connection:
        page = versions.list_versions(
            connection, caller.tenant, base=base, status=status, after=after, limit=limit
        )
        data = [version_body(connection, version) for version in page.items]
    return ListOf(data=data, has_more=page.has_more)


@router.get("/{version_id}")
def get_version(version_id: Name, services: ServicesDep, caller: CallerDep) -> VersionBody:
    """One version: its stack of deltas, its recipe, its reports."""
    with services.database.read() as connection:
        return version_body(connection, versions.get_version(connection, caller.tenant, version_id))


@router.get(
    "/{version_id}/lineage",
    response_model=Lineage,
    responses={200: {"content": {DOT: {"schema": {"type": "string"}}}}},
)
def get_lineage(
    version_id: Name,
    services: ServicesDep,
    caller: CallerDep,
    format: Annotated[
        Literal["json", "dot"], Query(description="`dot` for Graphviz: an arrow to each parent.")
    ] = "json",
) -> Any:
    """The version and all its ancestors, each before its parents, down to the base."""
    with services.database.read() as connection:
        chain = versions.lineage(connection, caller.tenant, version_id)
        if format == "dot":
            return Response(as_dot(chain), media_type=DOT)
        return Lineage(
            data=[version_body(connection, version) for version in chain], edges=edges(chain)
        )


@router.post("/{version_id}/editability", status_code=http.HTTP_202_ACCEPTED)
def measure_editability(
    version_id: VersionId,
    body: Editability,
    services: ServicesDep,
    caller: CallerDep,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> JobBody:
    """Say, before anyone edits, how easily each layer is edited on these prompts."""
    asked = CreateEvaluation(model=version_id, editability=body)
    return submit_once(
        services,
        caller,
        response,
        idempotency_key,
        asked,
        lambda: check_request(services, caller, asked),
    )


@router.delete("/{version_id}")
def delete_version(version_id: Name, services: ServicesDep, caller: CallerDep) -> VersionBody:
    """Delete a version that no endpoint names. Rolling back to it will answer 410."""
    with services.database.write() as connection:
        return version_body(
            connection, versions.delete_version(connection, caller.tenant, version_id)
        )
