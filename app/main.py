"""The FastAPI application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.exc import SQLAlchemyError

from app import errors
from app.admin.readiness import Readings
from app.admin.routes import router as admin
from app.audit.routes import router as audit
from app.door import Door
from app.edits.routes import router as edits
from app.endpoints.routes import router as endpoints
from app.evaluations.routes import router as evaluations
from app.files.routes import router as files
from app.fine_tuning.routes import router as fine_tuning
from app.follower import Follower
from app.gate import Gate, Passage
from app.history.routes import router as history
from app.inference.routes import router as inference
from app.jobs.routes import router as jobs
from app.keys.routes import router as keys
from app.loops import running
from app.merges.routes import router as merges
from app.metrics.meters import Meters
from app.metrics.routes import router as metrics
from app.observer import Observer
from app.openapi import Application
from app.services import Services, needs
from app.strict import Router
from app.versions.routes import router as versions
from app.webhooks.routes import router as webhooks
from app.webhooks.sender import Sender
from registry import __version__
from registry.bootstrap import bootstrap
from registry.errors import Conflict, ErrataError, Unavailable
from registry.garbage import Collector
from registry.settings import Settings
from telemetry.logs import describe

logger = logging.getLogger("errata.api")
DISPATCH_SECONDS = 0.2
AWAY_SECONDS = 1.0
COLLECT_SECONDS = 3600.0
#: The routes, and the scope that a caller of them must have.
ROUTERS: tuple[tuple[Router, str | None], ...] = (
    (inference, "infer"),
    (files, "edit"),
    (edits, "edit"),
    (evaluations, "edit"),
    (fine_tuning, "edit"),
    (merges, "edit"),
    (jobs, "edit"),
    (versions, "edit"),
    (history, "edit"),
    (endpoints, "edit"),
    (keys, "admin"),
    (audit, "admin"),
    (webhooks, "admin"),
    (admin, None),
    (metrics, None),
)


def create_app(settings: Settings, services: Services | None = None) -> FastAPI:
    """The application. Without ``services`` it only describes itself (OpenAPI)."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if services is None:
            yield
            return
        bootstrap(services.database, services.bases.values())
        follower = Follower(services.database, services.bases, services.engine, services.notices)
        sender = Sender(services.database, services.settings)
        collector = Collector(services.database, services.artifacts)
        works = {
            "dispatch": _dispatch(services),
            "the garbage collector": collect_garbage(collector, services.settings.gc_grace_seconds),
            "the follower of endpoints": follower.run(),
            "the sender of webhooks": sender.run(),
        }
        try:
            async with running(works, services.gate):
                yield
        finally:
            await services.engine.close()
            await services.limiter.close()
            services.database.close()

    app = Application(
        title="Errata",
        version=__version__,
        description=(
            "Edit language models over REST: every change a small immutable delta, every version"
            " a stack of deltas on an untouched base, every endpoint a pointer that moves and"
            " rolls back."
        ),
        lifespan=lifespan,
        telemetry={  # spans of requests alone, to where telemetry.traces sends them
            "auto_configure": False,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
        },
        responses=errors.RESPONSES,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    app.state.services = services
    app.state.readings = None if services is None else Readings(services)
    app.add_middleware(
        errors.BodyLimit,
        limit=settings.max_body_bytes,
        upload_path=files.prefix,
        upload_limit=settings.max_file_bytes,
    )
    app.add_middleware(Door, settings=settings)
    app.add_middleware(Passage, gate=Gate() if services is None else services.gate)
    meters = Meters() if services is None else services.meters
    app.add_middleware(Observer, meters=meters)
    errors.install(app, [route for router, _ in ROUTERS for route in router.routes], meters)
    for router, scope in ROUTERS:
        app.include_router(router, dependencies=[] if scope is None else [needs(scope)])
    return app


async def _dispatch(services: Services) -> None:
    """Keep the queue in step with SQL for as long as the service runs."""
    while True:
        try:
            await run_in_threadpool(services.dispatcher.tick)
        except (Unavailable, SQLAlchemyError) as error:
            logger.warning(
                "dispatch: the database does not answer: %s", describe(error.__cause__ or error)
            )
            await asyncio.sleep(AWAY_SECONDS)
        await asyncio.sleep(DISPATCH_SECONDS)


async def collect_garbage(collector: Collector, grace: float) -> None:
    """Delete artifacts that nothing reaches, again and again; replicas may do so at once."""
    told = ""
    while True:
        await asyncio.sleep(min(COLLECT_SECONDS, grace))
        try:
            swept = await run_in_threadpool(collector.collect, grace)
        except Conflict as error:  # the artifacts are another registry's, until somebody acts
            if error.message != told:
                logger.warning("garbage stays: %s", error.message)
            told = error.message
            continue
        except (ErrataError, SQLAlchemyError, OSError) as error:
            logger.warning("garbage stays for now: %s", describe(error.__cause__ or error))
            continue
        if swept.count:
            logger.info("deleted %d artifacts of %d bytes", swept.count, swept.size)
