"""What a service does beside answering requests, for as long as it runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager

from app.gate import Gate

logger = logging.getLogger("errata.api")


@asynccontextmanager
async def running(
    works: Mapping[str, Coroutine[None, None, None]], gate: Gate
) -> AsyncIterator[None]:
    """Within it the works run, by name. The service stops where one of them fails."""
    tasks = [asyncio.create_task(_watched(name, work, gate)) for name, work in works.items()]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _watched(name: str, work: Coroutine[None, None, None], gate: Gate) -> None:
    try:
        await work
    except Exception as error:
        logger.critical("%s failed, and the service stops", name, exc_info=error)
        gate.fail()
