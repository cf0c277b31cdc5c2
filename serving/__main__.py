"""``python -m serving --socket PATH``: the engine as a process of its own."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from registry.bases import find_bases
from registry.errors import ErrataError
from registry.settings import Settings
from registry.stores import open_store
from serving.lane import Lane
from serving.loading import load_lane
from serving.memory import keep_freed_memory
from serving.server import Server
from serving.socket_file import SocketFile
from serving.versions import Versions
from telemetry import logs

#: Seconds that the step in work gets to end when the engine is told to.
LAST_STEP = 2.0

logger = logging.getLogger("serving")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m serving", description=__doc__)
    parser.add_argument("--socket", type=Path, required=True, help="Unix socket to listen on")
    parser.add_argument("--parent", type=int, help="end when this process is the parent no more")
    options = parser.parse_args()
    settings = Settings()
    logs.configure(settings.log_format, settings.log_level)
    status = 0
    try:
        asyncio.run(_serve(settings, options.socket, options.parent))
    except ErrataError as error:
        sys.exit(f"engine: {error.message}")
    except Exception:
        logger.critical("the process ends", exc_info=True)
        status = 1
    logging.shutdown()
    os._exit(status)  # nothing is left to save; a thread may still read a delta


async def _serve(settings: Settings, path: Path, parent: int | None) -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    stopping: list[asyncio.Future[Any]] = [
        loop.create_task(stopped.wait()),
        loop.create_task(_parted(parent)),
    ]
    file = SocketFile(path)
    stepping = ThreadPoolExecutor(1, thread_name_prefix="step")
    try:
        loading = loop.run_in_executor(stepping, _load, settings)
        await asyncio.wait([loading, *stopping], return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            return
        server = Server(loading.result(), _versions(settings, loading.result()))
        running = loop.run_in_executor(stepping, server.engine.run)
        try:
            file.publish()
            await server.serve(file.socket)
            logger.info("listening")
            await asyncio.wait([running, *stopping], return_when=asyncio.FIRST_COMPLETED)
        finally:
            server.engine.stop()
        await asyncio.wait([running], timeout=LAST_STEP)
        if running.done():
            running.result()  # raises what ended the step thread, if anything did
    finally:
        file.remove()


def _load(settings: Settings) -> list[Lane]:
    """Load every base, in the thread that will step them."""
    torch.set_num_threads(settings.engine_threads)
    keep_freed_memory()
    return [load_lane(base, settings) for base in find_bases(settings.bases).values()]


def _versions(settings: Settings, lanes: list[Lane]) -> Versions:
    on_cpu = all(lane.runner.model.device.type == "cpu" for lane in lanes)
    return Versions(
        open_store(settings),
        settings.resident_bytes,
        host_bytes=0 if on_cpu else settings.host_bytes,
    )


async def _parted(parent: int | None) -> None:
    """Returns when the parent died: nobody else would stop this process."""
    while parent is None or os.getppid() == parent:
        await asyncio.sleep(1)


if __name__ == "__main__":
    main()
