"""Follows endpoints' moves, and has the engine load the versions that they name.

A request is resolved in SQL and so never stale: what is gained is that the first request after a
move, at whichever replica, finds its version loaded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress

from fastapi.concurrency import run_in_threadpool
from sqlalchemy.exc import SQLAlchemyError

from registry import endpoints, failpoints, versions
from registry.bases import Base, base_of
from registry.database import Database
from registry.endpoints import Endpoint
from registry.errors import ErrataError, Unavailable, VersionUnavailable
from registry.signatures import check_servable
from serving.client import EngineClient
from serving.protocol import VersionRef
from telemetry.logs import describe
from workers.notices import Notices

logger = logging.getLogger("errata.follower")
#: A move whose notice was lost is found within this time.
POLL_SECONDS = 0.5
AWAY_SECONDS = 1.0
#: Longest time that a version is waited for, longer than an engine is, or than one waits for room.
#: The engine goes on with it meanwhile.
WARM_SECONDS = 15.0


class Follower:
    """Warms the engine's versions, endpoint by endpoint, at start and after each move."""

    def __init__(
        self,
        database: Database,
        bases: Mapping[str, Base],
        engine: EngineClient,
        notices: Notices,
    ) -> None:
        self._database = database
        self._bases = bases
        self._engine = engine
        self._notices = notices
        self._heard = asyncio.Event()
        self._seen: dict[tuple[str, str], int] = {}  # generations by tenant and name
        self._failed: set[str] = set()  # versions whose failure was logged

    async def run(self) -> None:
        """Until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._hear())
            group.create_task(self._follow())

    async def _hear(self) -> None:
        async for _ in self._notices.heard():
            self._heard.set()

    async def _follow(self) -> None:
        while True:
            self._heard.clear()
            try:
                await self._warm_all(await run_in_threadpool(self._moved))
            except (Unavailable, SQLAlchemyError) as error:
                logger.warning(
                    "the database does not answer: %s", describe(error.__cause__ or error)
                )
                await asyncio.sleep(AWAY_SECONDS)
            with suppress(TimeoutError):  # not wait_for, which may swallow a cancellation
                async with asyncio.timeout(POLL_SECONDS):
                    await self._heard.wait()

    def _moved(self) -> list[Endpoint]:
        with self._database.read() as connection:
            return endpoints.list_moved(connection, self._seen)

    async def _warm_all(self, moved: list[Endpoint]) -> None:
        with suppress(Unavailable):  # the engine is starting; what is not seen comes again
            for endpoint in moved:
                await self._warm(endpoint)

    async def _warm(self, endpoint: Endpoint) -> None:
        for target in endpoint.state:
            try:
                ref = await run_in_threadpool(self._ref, endpoint.tenant, target.version)
                async with asyncio.timeout(WARM_SECONDS):
                    await self._engine.warm(ref)
            except TimeoutError:
                told = f"version {target.version} is not loaded after {WARM_SECONDS:g} s"
                self._tell(endpoint, target.version, told)
            except ErrataError as error:
                if isinstance(error, Unavailable) and not isinstance(error, VersionUnavailable):
                    raise
                self._tell(endpoint, target.version, error.message)
        self._seen[endpoint.tenant, endpoint.name] = endpoint.generation

    def _tell(self, endpoint: Endpoint, version_id: str, what: str) -> None:
        if version_id not in self._failed:
            self._failed.add(version_id)
            logger.warning("endpoint %r moved: %s", endpoint.name, what)

    def _ref(self, tenant: str, version_id: str) -> VersionRef:
        with self._database.read() as connection:
            manifest = versions.get_version(connection, tenant, version_id).manifest
            check_servable(connection, tenant, manifest)
        base_of(self._bases, version_id, manifest.base)
        failpoints.reach("warming")
        return VersionRef.of(manifest)
