"""Whether each part of the service works, and why one does not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Collection
from typing import Literal, TypeVar, get_args

from pydantic import BaseModel, Field
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from app.probes import PROBE_SECONDS, Probe
from app.services import Services
from registry.errors import ErrataError
from serving.status import EngineStatus
from telemetry.logs import describe

logger = logging.getLogger("errata.readiness")
T = TypeVar("T")
Part = Literal["database", "queue", "engine", "workers", "artifacts", "service"]
PARTS: frozenset[Part] = frozenset(get_args(Part))
#: Seconds that a part's good answer holds.
KEEP_SECONDS = 1.0
#: What is wrong with a part that answers with an error, and what to look at.
CURES: dict[Part, str] = {
    "database": "takes no writing transaction; see ERRATA_DATABASE_URL, its disk and its locks",
    "queue": "does not answer; see REDIS_URL, or the queue's log in the data folder",
    "engine": "does not answer: it is starting, or it stopped; its log says which",
    "artifacts": "cannot be written to; see ERRATA_ARTIFACTS and its disk",
}


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
    ready: bool = Field(description="Whether the parts that were asked for are; by default all.")
    database: bool
    queue: bool
    engine: bool
    artifacts: bool
    workers: int = Field(
        description="Workers that can take a job, are at one, or get ready for the next."
    )
    bases: list[BaseReadiness]
    reasons: dict[Part, str] = Field(description="By part, why it is not ready.")


class Readings:
    """Asks all parts at once; each has ``PROBE_SECONDS``.

    Nobody needs a key to ask, so that not every question writes, or goes over the network.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._database = Probe("database", services.database.check, keep=KEEP_SECONDS)
        self._artifacts = Probe("artifacts", services.artifacts.check, keep=KEEP_SECONDS)
        self._workers = Probe("workers", services.dispatcher.workers_ready, keep=KEEP_SECONDS)
        self._told: dict[Part, str] = {}

    async def read(self, parts: Collection[Part] = PARTS) -> Readiness:
        """How it stands now, and whether these parts are ready; a change of any is logged."""
        reasons: dict[Part, str] = {}
        workers, status, *_ = await asyncio.gather(
            self._asked("queue", self._workers.answer(), reasons),
            self._asked("engine", self._engine(), reasons),
            self._asked("database", self._database.answer(), reasons),
            self._asked("artifacts", self._artifacts.answer(), reasons),
        )
        if "queue" not in reasons and not workers:
            reasons["workers"] = "none is ready to take a job: `errata worker` starts one"
        if status is not None:
            lacking = set(self._services.bases) - {base.name for base in status.bases}
            if lacking:
                reasons["engine"] = f"lacks bases: {', '.join(sorted(lacking))}"
        if self._services.gate.stopping:
            reasons["service"] = "is stopping and takes no new requests"
        self._tell(reasons)
        return Readiness(
            ready=reasons.keys().isdisjoint(parts),
            database="database" not in reasons,
            queue="queue" not in reasons,
            engine="engine" not in reasons,
            artifacts="artifacts" not in reasons,
            workers=workers or 0,
            bases=[] if status is None else [_base(base) for base in status.bases],
            reasons=reasons,
        )

    async def _engine(self) -> EngineStatus:
        async with asyncio.timeout(PROBE_SECONDS):
            return await self._services.engine.status()

    async def _asked(self, part: Part, asked: Awaitable[T], reasons: dict[Part, str]) -> T | None:
        """The answer; None where there is none, and the reason is noted."""
        try:
            return await asked
        except TimeoutError:
            reasons[part] = f"does not answer within {PROBE_SECONDS:g} s"
        except (SQLAlchemyError, RedisError, OSError, ErrataError) as error:
            reasons[part] = CURES[part]
            logger.debug("%s: %s", part, describe(error))
        return None

    def _tell(self, reasons: dict[Part, str]) -> None:
        for part, reason in reasons.items():
            if self._told.get(part) != reason:
                logger.warning("not ready: %s: %s", part, reason)
        for part in self._told.keys() - reasons.keys():
            logger.info("ready again: %s", part)
        self._told = reasons


def _base(base: object) -> BaseReadiness:
    return BaseReadiness.model_validate(base, from_attributes=True)
