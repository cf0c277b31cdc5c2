"""What preprocessing makes of a file's first rows: here, or in a job where a version is asked."""

from __future__ import annotations

from itertools import islice

from sqlalchemy import Connection

from app.files.schemas import PreviewBody, PreviewOf
from app.services import Caller, Services
from app.submission import Submit, named_version
from registry import jobs
from registry.bases import Base, base_of
from registry.errors import UnprocessableRequest
from registry.files import File, get_file
from registry.jobs import Job
from registry.rows import StoredRows
from workers.preprocessing import check_forms, preview_rows

PURPOSE = "fine-tune"


def preview(services: Services, caller: Caller, body: PreviewOf) -> PreviewBody:
    """The preview of steps that ask no version.

    Raises:
        NotFound; UnprocessableRequest: a file for another purpose, a row that a step does not take.
    """
    with services.database.read() as connection:
        file = _file(connection, caller, body.file)
    rows = _checked(services, file, body)
    return PreviewBody(**preview_rows(body.preprocessing, rows, body.limit))


def check_request(services: Services, caller: Caller, body: PreviewOf) -> Submit:
    """Check a request; what is returned submits the job.

    Raises:
        ErrataError: names the field that is wrong; nothing is left behind.
    """
    if body.model is None:
        raise UnprocessableRequest(
            "model is missing; a step of preprocessing asks a version for its answers: name an"
            " endpoint, a version or a base",
            param="model",
        )
    with services.database.read() as connection:
        file = _file(connection, caller, body.file)
        parent = named_version(connection, services, caller, body.model, ready=True)
    base = base_of(services.bases, parent.id, parent.manifest.base)
    _checked(services, file, body, base)
    request = {
        **body.model_dump(mode="json", include={"preprocessing", "limit"}),
        "rows": file.rows,
        "files": [file.id],
    }

    def submit(connection: Connection) -> Job:
        get_file(connection, caller.tenant, file.id)
        return jobs.submit_job(
            connection,
            caller.tenant,
            "preview",
            base=base.name,
            request=request,
            actor=caller.actor,
            parent=parent.id,
        )

    return submit


def _file(connection: Connection, caller: Caller, file_id: str) -> File:
    file = get_file(connection, caller.tenant, file_id)
    if file.purpose != PURPOSE:
        raise UnprocessableRequest(
            f"file {file_id!r} was uploaded for {file.purpose!r}; a file of purpose {PURPOSE!r} is"
            " preprocessed",
            param="file_id",
        )
    return file


def _checked(
    services: Services, file: File, body: PreviewOf, base: Base | None = None
) -> StoredRows:
    """The file's rows, of which the first are looked at."""
    rows = services.artifacts.rows(file.rows)
    check_forms(body.preprocessing, islice(rows, body.limit), "file", base)
    return rows
