"""``/v1/versions``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Path, Query, Response
from fastapi import status as http
from fastapi.responses import JSONResponse, StreamingResponse

from app.evaluations.schemas import CreateEvaluation, Editability
from app.evaluations.submit import check_request
from app.files.content import content
from app.jobs.schemas import JobBody, job_body
from app.schemas import Limit, ListOf, Name
from app.services import CallerDep, ServicesDep
from app.strict import Router
from app.submission import SubmissionDep, check_room
from app.versions.envelopes import read_envelope
from app.versions.exchange import check_export, check_import, find_export
from app.versions.graph import DOT, as_dot, edges
from app.versions.schemas import (
    Envelope,
    ExportOptions,
    ImportVersion,
    Lineage,
    VersionBody,
    version_body,
)
from registry import dsse, jobs, signatures, versions
from registry.errors import UnprocessableRequest
from registry.signing import PAYLOAD_TYPE, payload_of

router = Router(prefix="/v1/versions", tags=["versions"])
EXPORT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/zip": {}}, "description": "The archive."},
    202: {"model": JobBody, "description": "The job that makes the archive."},
}
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


@router.get("/{version_id}/signatures")
def get_signatures(version_id: Name, services: ServicesDep, caller: CallerDep) -> Envelope:
    """The version's manifest and its signatures, as a DSSE envelope."""
    with services.database.read() as connection:
        manifest = versions.get_version(connection, caller.tenant, version_id).manifest
        found = signatures.signatures_of(connection, caller.tenant, manifest)
    return Envelope(**dsse.envelope(PAYLOAD_TYPE, payload_of(manifest), found))


@router.post("/{version_id}/signatures", status_code=http.HTTP_201_CREATED)
def add_signatures(
    version_id: Name, body: Envelope, services: ServicesDep, caller: CallerDep
) -> VersionBody:
    """Add signatures that were made elsewhere, by keys that are trusted here; no others."""
    with services.database.write() as connection:
        version = versions.get_version(connection, caller.tenant, version_id)
        new = read_envelope(body, version.manifest, services.database.trust)
        signatures.add_signatures(
            connection, caller.tenant, version.manifest, new, actor=caller.actor
        )
        return version_body(connection, version)


@router.post("/{version_id}/editability", status_code=http.HTTP_202_ACCEPTED)
def measure_editability(
    version_id: VersionId, body: Editability, submission: SubmissionDep
) -> JobBody:
    """Say, before anyone edits, how easily each layer is edited on these prompts."""
    asked = CreateEvaluation(model=version_id, editability=body)
    return submission.once(check_request, asked)


@router.post("/import", status_code=http.HTTP_202_ACCEPTED)
def import_version(body: ImportVersion, submission: SubmissionDep) -> JobBody:
    """Make a version of a PEFT LoRA adapter, or restore one from an errata archive."""
    return submission.once(check_import, body)


@router.post("/{version_id}/export", status_code=http.HTTP_202_ACCEPTED)
def export_version(
    version_id: VersionId, body: ExportOptions, submission: SubmissionDep
) -> JobBody:
    """Write a version as a zip archive, which the job's ``result_files`` name."""
    return submission.once(check_export, version_id, body)


@router.get("/{version_id}/export", response_class=StreamingResponse, responses=EXPORT)
def get_export(
    version_id: VersionId,
    asked: Annotated[ExportOptions, Query()],
    services: ServicesDep,
    caller: CallerDep,
) -> Response:
    """The archive (200) where it was made; else the job that makes it (202), one for all who ask
    meanwhile. Where that job failed, its error."""
    with services.database.read() as connection:
        versions.get_ready_version(connection, caller.tenant, version_id)
        job, file = find_export(connection, caller, version_id, asked)
    if job is None:
        submit = check_export(services, caller, version_id, asked)
        with services.database.write() as connection:
            job, file = find_export(connection, caller, version_id, asked)
            if job is None:
                check_room(connection, services, caller)
                job = submit(connection)
    if file is not None:
        return content(services, file, file.filename, "application/zip")
    if job.status == jobs.FAILED:
        error = job.error or {}
        raise UnprocessableRequest(
            f"{error.get('message')} (job {job.id}; POST submits the export again)",
            param="format",
            code=error.get("code"),
        )
    with services.database.read() as connection:
        body = job_body(connection, job)
    headers = {"Location": f"/v1/jobs/{job.id}"}
    return JSONResponse(body.model_dump(mode="json"), http.HTTP_202_ACCEPTED, headers)


@router.delete("/{version_id}")
def delete_version(version_id: Name, services: ServicesDep, caller: CallerDep) -> VersionBody:
    """Delete a version that no endpoint names. Rolling back to it will answer 410."""
    with services.database.write() as connection:
        version = versions.delete_version(connection, caller.tenant, version_id, actor=caller.actor)
        return version_body(connection, version)
