"""Files that users upload and jobs leave: rows that name artifacts, kept until deleted."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select

from registry import audit, tables
from registry.errors import Conflict, NotFound
from registry.jobs import ENDED, Job
from registry.pages import Page, newest_first


@dataclass(frozen=True)
class File:
    """A row of the files table.

    Attributes:
        size: bytes, as uploaded.
        content: digest of the artifact that holds the file as it was uploaded.
        rows: digest of the artifact that holds what the file was read as, a JSON list.
    """

    seq: int
    id: str
    tenant: str
    filename: str
    purpose: str
    size: int
    content: str
    rows: str
    row_count: int
    created_at: float


@dataclass(frozen=True)
class ResultFile:
    """What a job leaves to be downloaded.

    Attributes:
        content: digest of the artifact that holds it.
        rows: how many it has.
    """

    filename: str
    purpose: str
    size: int
    content: str
    rows: int


def result_file_id(job_id: str) -> str:
    """The id of the file that a job leaves: one a job, whatever its attempts."""
    return "file-" + job_id.removeprefix("job_")


def add_file(
    connection: Connection,
    tenant: str,
    *,
    filename: str,
    purpose: str,
    size: int,
    content: str,
    rows: str,
    row_count: int,
    actor: str,
    file_id: str | None = None,
) -> File:
    """Keep a file whose artifacts are stored."""
    file_id = file_id or "file-" + secrets.token_hex(16)
    connection.execute(
        insert(tables.files).values(
            id=file_id,
            tenant=tenant,
            filename=filename,
            purpose=purpose,
            size=size,
            content=content,
            rows=rows,
            row_count=row_count,
            created_at=time.time(),
        )
    )
    told = {"filename": filename, "purpose": purpose, "size": size}
    audit.record(connection, tenant, actor=actor, action="file.add", object=file_id, after=told)
    return get_file(connection, tenant, file_id)


def get_file(connection: Connection, tenant: str, file_id: str) -> File:
    """The file of that id.

    Raises:
        NotFound: the tenant has no such file.
    """
    row = connection.execute(
        select(tables.files).where(tables.files.c.tenant == tenant, tables.files.c.id == file_id)
    ).one_or_none()
    if row is None:
        raise NotFound(
            f"file {file_id!r} does not exist; GET /v1/files lists those that do",
            code="file_not_found",
        )
    return _file(row)


def find_result_file(connection: Connection, job: Job) -> File | None:
    """What a job left to be downloaded, if it did and nobody deleted it."""
    try:
        return get_file(connection, job.tenant, result_file_id(job.id))
    except NotFound:
        return None


def result_files(connection: Connection, job: Job) -> list[str]:
    """The ids of the files that a job left and nobody deleted: one, or none."""
    file = find_result_file(connection, job) if job.ended else None
    return [] if file is None else [file.id]


def list_files(
    connection: Connection,
    tenant: str,
    *,
    purpose: str | None = None,
    after: str | None = None,
    limit: int = 20,
) -> Page[File]:
    """Newest first."""
    table = tables.files
    query = select(table).where(table.c.tenant == tenant)
    if purpose is not None:
        query = query.where(table.c.purpose == purpose)
    before = None if after is None else get_file(connection, tenant, after).seq
    return newest_first(connection, query, table.c.seq, _file, before=before, limit=limit)


def delete_file(connection: Connection, tenant: str, file_id: str, *, actor: str) -> File:
    """Forget a file. Versions and reports made from it keep the artifacts that they name.

    Raises:
        NotFound; Conflict: an unfinished job needs it.
    """
    file = get_file(connection, tenant, file_id)
    jobs = tables.jobs
    unfinished = connection.execute(
        select(jobs.c.id, jobs.c.request).where(
            jobs.c.tenant == tenant, jobs.c.status.not_in(ENDED)
        )
    )
    for job_id, request in unfinished:
        if file_id in request.get("files", ()):
            raise Conflict(
                f"file {file_id!r} is needed by job {job_id}, which has not ended; wait for it or"
                f" cancel it (POST /v1/jobs/{job_id}/cancel), then delete",
                code="file_in_use",
            )
    connection.execute(
        delete(tables.files).where(tables.files.c.tenant == tenant, tables.files.c.id == file_id)
    )
    told = {"filename": file.filename, "purpose": file.purpose, "size": file.size}
    audit.record(connection, tenant, actor=actor, action="file.delete", object=file_id, before=told)
    return file


def _file(row: Row[Any]) -> File:
    return File(**row._mapping)
