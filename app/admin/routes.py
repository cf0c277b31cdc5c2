"""``/healthz`` and ``/readyz``."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Query, Request, Response
from pydantic import BaseModel

from app.admin.readiness import PARTS, Part, Readiness, Readings
from app.strict import Router

router = Router(tags=["operations"])


class Health(BaseModel):
    status: Literal["ok"] = "ok"


@router.get("/healthz")
async def healthz() -> Health:
    """The process answers. On the loop, since a database that hangs takes the threads."""
    return Health()


@router.get("/readyz", responses={503: {"model": Readiness, "description": "Not ready."}})
async def readyz(
    request: Request,
    response: Response,
    part: Annotated[
        list[Part] | None,
        Query(
            description="Only whether these are ready; `engine` and `service` are this replica's."
        ),
    ] = None,
) -> Readiness:
    """Whether database, queue, engine, workers and artifacts answer; 503 while one does not."""
    readings: Readings = request.app.state.readings
    readiness = await readings.read(part or PARTS)
    response.status_code = 200 if readiness.ready else 503
    return readiness
