"""``errata serve``: the API in this process; queue, engine and workers as its children."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import uvicorn

from app.gate import Gate, stopped
from app.limits import Limiter
from app.loops import running
from app.main import create_app
from app.services import Services
from registry import keys
from registry.bases import Base, find_bases
from registry.database import Database
from registry.errors import ErrataError, InvalidRequest
from registry.identity import claim_store
from registry.settings import Settings
from registry.signing import Trust, signer_of
from registry.stores import await_store, open_store
from serving.client import EngineClient
from serving.memory import share_arenas
from telemetry import traces
from workers.connection import connect, wait_for_queue
from workers.dispatch import Dispatcher
from workers.embedded import EmbeddedQueue
from workers.notices import Notices
from workers.supervisor import Child, Supervisor

logger = logging.getLogger("errata.serve")
STOPS = (signal.SIGTERM, signal.SIGINT)
TICK_SECONDS = 0.1
#: Beyond ERRATA_STOP_SECONDS: for what was told to end to do so.
LAST_SECONDS = 10
QUEUE_PATIENCE = 1.0
#: Seconds that the queue has to answer who only wants to know whether it does.
QUEUE_PROBE = 1.5
#: Seconds in which streams that are ended say so.
GOODBYE_SECONDS = 1.0
#: What the names of workers begin with.
WORKER = "worker-"


def serve(settings: Settings) -> None:
    """Run the service until SIGTERM or SIGINT.

    Raises:
        ErrataError: a setting that cannot work, with the cure; or something that the service cannot
            do without failed.
    """
    share_arenas()
    if (problem := traces.problem()) is not None:
        raise InvalidRequest(problem)
    traces.configure("api")
    bases = find_bases(settings.bases)
    settings.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    signer_of(settings)  # what a worker will ask for
    with contextlib.closing(Database(settings.sql_url, Trust.of(settings))) as database:
        _serve(settings, bases, database)


def _serve(settings: Settings, bases: dict[str, Base], database: Database) -> None:
    database.wait(settings.wait_seconds)
    database.migrate()
    if settings.redis_url:
        wait_for_queue(settings.redis_url, settings.wait_seconds)
    _refuse_open_door(settings, database)
    await_store(settings)
    artifacts = open_store(settings)
    claim_store(database, artifacts)
    with _runtime_folder(settings) as runtime:
        queue = (
            None if settings.redis_url else EmbeddedQueue(settings.data / "queue", runtime / "q")
        )
        redis_url = settings.redis_url if queue is None else queue.url
        engine_socket = runtime / "e"
        children = [] if queue is None else [queue.child()]
        children.append(_engine(settings, engine_socket))
        children += [
            _worker(settings, redis_url, number) for number in range(1, settings.workers + 1)
        ]
        supervisor = Supervisor(children)
        services = Services(
            settings=settings,
            bases=bases,
            database=database,
            artifacts=artifacts,
            engine=EngineClient(engine_socket),
            dispatcher=Dispatcher(
                database,
                connect(redis_url, patience=QUEUE_PATIENCE),
                settings,
                quick=connect(redis_url, patience=0, timeout=QUEUE_PROBE),
            ),
            notices=Notices(redis_url),
            limiter=Limiter(redis_url),
        )
        for stop in STOPS:
            signal.signal(stop, _leave)
        try:
            supervisor.start()
            asyncio.run(_serve_api(settings, services, supervisor))
        finally:
            for stop in STOPS:  # attempts keep their time; who has none to give sends SIGKILL
                signal.signal(stop, signal.SIG_IGN)
            closed = services.gate.closed_for
            supervisor.stop(max(0.0, settings.stop_seconds - closed) + LAST_SECONDS)
            if queue is not None:
                queue.close()
            traces.flush()
    if services.gate.failed:
        raise ErrataError("a part of the service failed, and it stopped for that; the log says why")


def _leave(_signal: int, _frame: FrameType | None) -> NoReturn:
    """Leave through every finally: children are stopped in order, folders removed."""
    raise SystemExit(0)


class _Server(uvicorn.Server):
    """Goes on answering when it is told to stop, until ``should_exit`` is set."""

    def __init__(self, config: uvicorn.Config, gate: Gate) -> None:
        super().__init__(config)
        self._gate = gate

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._gate.close()


async def _serve_api(settings: Settings, services: Services, supervisor: Supervisor) -> None:
    for stop in STOPS:  # raising within the loop would break off its end, with threads waiting
        signal.signal(stop, lambda _signal, _frame: services.gate.close())
    config = uvicorn.Config(
        create_app(settings, services),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=LAST_SECONDS,
    )
    server = _Server(config, services.gate)
    works = {
        "the supervisor": _supervise(supervisor),
        "the drain": _drain(server, services, supervisor),
    }
    async with running(works, services.gate):
        await server.serve()


async def _supervise(supervisor: Supervisor) -> None:
    """On the main thread, since children live as long as the thread that started them."""
    while True:
        supervisor.tick()
        await asyncio.sleep(TICK_SECONDS)


async def _drain(server: uvicorn.Server, services: Services, supervisor: Supervisor) -> None:
    """Once the gate is closed: let requests and attempts end, then end them, then the server."""
    try:
        await _drained(services, supervisor)
    finally:
        server.should_exit = True


async def _drained(services: Services, supervisor: Supervisor) -> None:
    gate, seconds = services.gate, services.settings.stop_seconds
    while not gate.stopping:
        await asyncio.sleep(TICK_SECONDS)
    logger.info("stopping: %d requests have %g s to end", gate.running, seconds)
    supervisor.dismiss(WORKER)
    while gate.running and not gate.hurried and gate.closed_for < seconds:
        await asyncio.sleep(TICK_SECONDS)
    if gate.running:
        logger.warning("%d requests did not end in time and are broken off", gate.running)
        gate.expired = True
        await services.engine.close(stopped())
        end = time.monotonic() + GOODBYE_SECONDS  # streams say why they end
        while gate.running and time.monotonic() < end:
            await asyncio.sleep(TICK_SECONDS)
        gate.expire()


def _engine(settings: Settings, socket: Path) -> Child:
    command = [sys.executable, "-m", "serving", "--socket", str(socket)]
    threads = str(settings.engine_threads)
    environment = {**settings.environment(), "OMP_NUM_THREADS": threads}
    return Child("engine", command, environment, ready=socket.exists)


def _worker(settings: Settings, redis_url: str, number: int) -> Child:
    command = [sys.executable, "-m", "app.cli", "worker"]
    threads = str(settings.worker_threads)
    environment = {**settings.environment(), "REDIS_URL": redis_url, "OMP_NUM_THREADS": threads}
    return Child(f"{WORKER}{number}", command, environment)


@contextlib.contextmanager
def _runtime_folder(settings: Settings) -> Iterator[Path]:
    """A private folder with a short path: a Unix socket's path must stay under 108 bytes."""
    if settings.runtime is not None:
        settings.runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield settings.runtime
        return
    with tempfile.TemporaryDirectory(prefix="errata-") as folder:
        yield Path(folder)


def _refuse_open_door(settings: Settings, database: Database) -> None:
    """Where a key is asked for there must be one; without keys only this machine may ask."""
    if not settings.needs_keys:
        return
    with database.read() as connection:
        if keys.has_live_key(connection):
            return
    raise InvalidRequest(
        f"ERRATA_HOST is {settings.host!r}, where API keys are asked for, and there is none yet:"
        " `errata keys create NAME --scope admin` with the same ERRATA_DATA (or"
        " ERRATA_DATABASE_URL) makes one; without keys bind to 127.0.0.1",
        param="ERRATA_HOST",
    )
