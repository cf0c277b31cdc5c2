"""``/healthz`` and ``/readyz``."""

from __future__ import annotations

import asyncio
from typing import Literal

from fastapi import Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel
from sqlalchemy import text

from app.services import Services, ServicesDep
from app.strict import Router
from registry.errors import ErrataError, Unavailable

router = Router(tags=["operations"])
PROBE_SECONDS = 2.0


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class BaseReadiness(BaseModel):
    name: str
    digest: str
    family: str
    dtype: str
    context_length: int
    batch_invariant: bool
    min_rows: int
    running: int
    waiting: int


class Readiness(BaseModel):
    ready: bool
    database: bool
    engine: bool
    workers: int
    bases: list[BaseReadiness]


@router.get("/healthz")
def healthz() -> Health:
    """The process answers."""
    return Health()


@router.get("/readyz", responses={503: {"model": Readiness, "description": "Not ready yet."}})
async def readyz(services: ServicesDep, response: Response) -> Readiness:
    """Whether database, engine and a worker answer; 503 while one does not."""
    database, workers, bases = await asyncio.gather(
        run_in_threadpool(_database_answers, services),
        run_in_threadpool(services.dispatcher.workers_ready),
        _bases(services),
    )
    ready = database and workers > 0 and bases is not None
    response.status_code = 200 if ready else 503
    return Readiness(
        ready=ready,
        database=database,
        engine=bases is not None,
        workers=workers,
        bases=bases or [],
    )


def _database_answers(services: Services) -> bool:
    try:
        with services.database.read() as connection:
            connection.execute(text("SELECT 1"))
    except Unavailable:
        return False
    return True


async def _bases(services: Services) -> list[BaseReadiness] | None:
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            status = await services.engine.status()
    except (TimeoutError, ErrataError):
        return None
    return [BaseReadiness.model_validate(base, from_attributes=True) for base in status.bases]
