"""``/metrics``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

from fastapi import Response
from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from sqlalchemy.exc import SQLAlchemyError

from app.metrics.families import engine_families, record_families
from app.probes import PROBE_SECONDS
from app.services import Services, ServicesDep
from app.strict import Router
from registry.counts import Counts
from registry.errors import ErrataError
from serving.status import EngineStatus

router = Router(tags=["operations"])


class Scrape:
    """All families at one moment."""

    def __init__(
        self, services: Services, status: EngineStatus | None, counts: Counts | None
    ) -> None:
        self._services, self._status, self._counts = services, status, counts

    def collect(self) -> Iterator[Metric]:
        yield from self._services.meters.registry.collect()
        yield from engine_families(self._status)
        yield from record_families(self._counts, time.time())


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}, "description": "Prometheus' text format."}},
)
async def metrics(services: ServicesDep) -> Response:
    """What monitoring reads. It names no tenant, key, endpoint or version, and asks for no key."""
    status, counts = await asyncio.gather(_status(services), _counts(services))
    text = generate_latest(Scrape(services, status, counts))
    return Response(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)


async def _status(services: Services) -> EngineStatus | None:
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            return await services.engine.status()
    except (TimeoutError, ErrataError):
        return None


async def _counts(services: Services) -> Counts | None:
    try:
        return await services.counts.answer()
    except (TimeoutError, SQLAlchemyError, ErrataError):
        return None
