"""A stored file as an answer."""

from __future__ import annotations

from fastapi.responses import StreamingResponse

from app.services import Services
from registry.files import File


def content(
    services: Services, file: File, name: str, media_type: str = "application/octet-stream"
) -> StreamingResponse:
    """The file's bytes, to be saved under a name that the service chose."""
    return StreamingResponse(
        services.artifacts.chunks(file.content),
        media_type=media_type,
        headers={
            "Content-Length": str(file.size),
            "Content-Disposition": f'attachment; filename="{name}"',
            "X-Content-Type-Options": "nosniff",
        },
    )
