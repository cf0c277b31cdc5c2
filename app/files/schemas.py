"""A file as REST shows it, in OpenAI's shape."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from registry.files import File


class FileBody(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    rows: int = Field(description="How many edits, examples, texts, facts or questions it holds.")
    status: Literal["processed"] = "processed"


class DeletedFile(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def file_body(file: File) -> FileBody:
    return FileBody(
        id=file.id,
        bytes=file.size,
        created_at=int(file.created_at),
        filename=file.filename,
        purpose=file.purpose,
        rows=file.row_count,
    )
