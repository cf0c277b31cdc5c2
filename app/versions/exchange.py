"""From a request to export or import a version to its job."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from app.services import Caller, Services
from app.submission import (
    NamedFiles,
    Submit,
    guard_files,
    guard_request,
    named_by,
    prepare_missing,
)
from app.versions.schemas import ExportOptions, ImportVersion
from registry import files, jobs, versions
from registry.bases import Base, base_of
from registry.errors import NotFound, UnprocessableRequest
from registry.files import File
from registry.jobs import Job
from registry.manifests import VersionManifest
from registry.versions import Version
from workers.archives import (
    ARCHIVE,
    ERRATA,
    PEFT,
    Upload,
    check_base,
    check_signed,
    open_upload,
)
from workers.recipes import TEXTS


def check_export(
    services: Services, caller: Caller, version_id: str, asked: ExportOptions
) -> Submit:
    """Check a request; what is returned submits the job.

    Raises:
        ErrataError: names the field that is wrong; nothing is left behind.
    """
    with services.database.read() as connection:
        version = versions.get_ready_version(connection, caller.tenant, version_id)
    base = base_of(services.bases, version.id, version.manifest.base)
    if asked.format == PEFT and not version.manifest.stack:
        raise UnprocessableRequest(
            f"version {version_id!r} is its untouched base: an adapter of it would hold nothing",
            param="format",
        )

    def submit(connection: Connection) -> Job:
        return jobs.submit_job(
            connection,
            caller.tenant,
            "export",
            base=base.name,
            request=asked.model_dump(),
            actor=caller.actor,
            parent=version.id,
        )

    return submit


def find_export(
    connection: Connection, caller: Caller, version_id: str, asked: ExportOptions
) -> tuple[Job | None, File | None]:
    """The newest export of a version that was asked for in the same way, and its file.

    Without a file it is under way, or failed; one whose file was deleted is not found.
    """
    job = jobs.latest_of(connection, caller.tenant, "export", version_id, asked.model_dump())
    file = None if job is None else files.find_result_file(connection, job)
    if job is not None and job.status in (jobs.SUCCEEDED, jobs.CANCELLED) and file is None:
        return None, None
    return job, file


def check_import(services: Services, caller: Caller, body: ImportVersion) -> Submit:
    """Check a request and the archive that it names; what is returned submits the job.

    Raises:
        ErrataError: names the field that is wrong; nothing is left behind.
    """
    named = NamedFiles({"file": (body.file, ARCHIVE), **guard_files(body.guards)})
    with services.database.read() as connection:
        rows = named.rows(connection, caller)
        parent = _parent(connection, caller, body)
    with services.artifacts.open(rows["file"]) as stream:
        upload = open_upload(stream, services.settings.max_file_bytes)
        base = _base(services, body, parent, upload)
    if parent is None:
        parent = _untouched(services, caller, base)
    request: dict[str, Any] = {
        "archive": rows["file"],
        "format": upload.kind,
        "label": body.label,
        "guards": guard_request(services, base, body.guards, rows),
        "files": named.ids,
    }

    def submit(connection: Connection) -> Job:
        named.rows(connection, caller)
        return jobs.submit_job(
            connection,
            caller.tenant,
            "import",
            base=base.name,
            request=request,
            actor=caller.actor,
            parent=parent.id,
            after=prepare_missing(connection, services, caller, base, frozenset({TEXTS})),
        )

    return submit


def _parent(connection: Connection, caller: Caller, body: ImportVersion) -> Version | None:
    if body.parent is None:
        return None
    with named_by("parent"):
        return versions.get_ready_version(connection, caller.tenant, body.parent)


def _base(services: Services, body: ImportVersion, parent: Version | None, upload: Upload) -> Base:
    """What the archive stands on, or is to stand on."""
    if upload.kind == ERRATA:
        for field in ("parent", "base", "label"):
            if getattr(body, field) is not None:
                raise UnprocessableRequest(
                    f"{field}: an errata archive restores the version that was exported, on the"
                    " base that it names; leave it out",
                    param=field,
                )
        history = upload.history()
        check_signed(history, services.database.trust)
        return check_base(history, services.bases)
    upload.form()
    if parent is not None:
        if body.base is not None:
            raise UnprocessableRequest("give base or parent, not both", param="base")
        return base_of(services.bases, parent.id, parent.manifest.base)
    name = body.base or next(iter(services.bases))
    if body.base is None and len(services.bases) > 1:
        raise UnprocessableRequest(
            f"say which base the adapter is of: base is one of {', '.join(services.bases)}",
            param="base",
        )
    if name not in services.bases:
        raise NotFound(
            f"base {name!r} does not exist; there is {', '.join(services.bases)}", param="base"
        )
    return services.bases[name]


def _untouched(services: Services, caller: Caller, base: Base) -> Version:
    with services.database.read() as connection:
        return versions.get_version(connection, caller.tenant, VersionManifest(base.ref).id)
