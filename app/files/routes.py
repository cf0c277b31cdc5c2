"""``/v1/files``."""

from __future__ import annotations

import re
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, File, Form, Query, Request, Response, UploadFile, status
from fastapi.responses import StreamingResponse

from app.files.content import content
from app.files.preview import check_request, preview
from app.files.schemas import (
    CreatePreview,
    DeletedFile,
    FileBody,
    PreviewBody,
    PreviewOf,
    file_body,
)
from app.jobs.schemas import JobBody
from app.schemas import Limit, ListOf, Name, unsupported
from app.services import CallerDep, ServicesDep
from app.strict import Router
from app.submission import SubmissionDep
from registry import files
from registry.artifacts import CHUNK_BYTES
from registry.errors import TooLarge, UnprocessableRequest
from workers.archives import ARCHIVE, open_upload
from workers.inputs import PURPOSES, read_file
from workers.preprocessing import needs_model

router = Router(prefix="/v1/files", tags=["files"])
PREVIEW_JOB: dict[int | str, dict[str, Any]] = {
    202: {"model": JobBody, "description": "The job that makes the preview."}
}
CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {}}, "description": "The file as uploaded."}
}


async def never_expires(request: Request) -> None:
    """Refuse ``expires_after[anchor]`` and the like: a file stays until it is deleted."""
    if any(name.partition("[")[0] == "expires_after" for name in await request.form()):
        raise unsupported("expires_after")


@router.post("", dependencies=[Depends(never_expires)])
def create_file(
    services: ServicesDep,
    caller: CallerDep,
    file: Annotated[
        UploadFile, File(description="A JSON list, JSON lines, plain lines; or a zip archive.")
    ],
    purpose: Annotated[
        str,
        Form(
            max_length=64,
            description="What its rows are.",
            json_schema_extra={"enum": list(PURPOSES)},
        ),
    ],
) -> FileBody:
    """Upload a file; it is read line by line now, so that what is wrong in it is said now."""
    filename = _filename(file.filename)
    limit = services.settings.max_file_bytes
    if file.size is None or file.size > limit:
        raise TooLarge(
            f"the file has more than {limit} bytes, the limit (ERRATA_MAX_FILE_BYTES)", param="file"
        )
    stream = file.file
    is_archive = purpose == ARCHIVE
    if is_archive:
        row_count = len(open_upload(stream, limit).archive.names)
    else:
        rows = services.artifacts.put_rows(read_file(purpose, stream))
        row_count = len(services.artifacts.rows(rows))
    stream.seek(0)
    kept = services.artifacts.put_chunks(iter(partial(stream.read, CHUNK_BYTES), b""))
    with services.database.write() as connection:
        return file_body(
            files.add_file(
                connection,
                caller.tenant,
                filename=filename,
                purpose=purpose,
                size=file.size,
                content=kept,
                rows=kept if is_archive else rows,
                row_count=row_count,
                actor=caller.actor,
            )
        )


@router.get("")
def list_files(
    services: ServicesDep,
    caller: CallerDep,
    purpose: Annotated[str | None, Query(max_length=64)] = None,
    after: Annotated[str | None, Query(description="The last id of the page before.")] = None,
    limit: Limit = 20,
    order: Annotated[str, Query(max_length=64, json_schema_extra={"enum": ["desc"]})] = "desc",
) -> ListOf[FileBody]:
    """Files, newest first."""
    if order != "desc":
        raise unsupported("order", neutral=True)
    with services.database.read() as connection:
        page = files.list_files(
            connection, caller.tenant, purpose=purpose, after=after, limit=limit
        )
    return ListOf(data=[file_body(file) for file in page.items], has_more=page.has_more)


@router.get("/{file_id}")
def get_file(file_id: Name, services: ServicesDep, caller: CallerDep) -> FileBody:
    """One file: its size, purpose and how many rows it holds."""
    with services.database.read() as connection:
        return file_body(files.get_file(connection, caller.tenant, file_id))


@router.get("/{file_id}/content", response_class=StreamingResponse, responses=CONTENT)
def get_content(file_id: Name, services: ServicesDep, caller: CallerDep) -> StreamingResponse:
    """The file as it was uploaded."""
    with services.database.read() as connection:
        file = files.get_file(connection, caller.tenant, file_id)
    return content(services, file, file.id)


@router.post("/{file_id}/preview", responses=PREVIEW_JOB)
def preview_file(
    file_id: Name,
    body: CreatePreview,
    services: ServicesDep,
    caller: CallerDep,
    response: Response,
    submission: SubmissionDep,
) -> PreviewBody | JobBody:
    """The first rows before and after preprocessing: at once or, where a step asks a version for
    its answers, as a job (202) whose metrics are the preview."""
    asked = PreviewOf(file=file_id, **dict(body))
    if not needs_model(body.preprocessing):
        return preview(services, caller, asked)
    response.status_code = status.HTTP_202_ACCEPTED
    return submission.once(check_request, asked)


@router.delete("/{file_id}")
def delete_file(file_id: Name, services: ServicesDep, caller: CallerDep) -> DeletedFile:
    """Forget a file; 409 while an unfinished job needs it. Versions made from it stay whole."""
    with services.database.write() as connection:
        file = files.delete_file(connection, caller.tenant, file_id, actor=caller.actor)
    return DeletedFile(id=file.id)


def _filename(name: str | None) -> str:
    """A label to show and nothing else: the last part of what the client calls the file."""
    label = re.split(r"[/\\]", name or "")[-1].strip()
    if not label or len(label) > 255 or not label.isprintable():
        raise UnprocessableRequest(
            "file must have a name of 1 to 255 printable characters", param="file"
        )
    return label
