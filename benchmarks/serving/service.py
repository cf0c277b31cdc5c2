"""``errata serve`` in processes of its own, with versions that nobody had to edit first."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from editing.deltas import Delta, Effect
from registry.bases import Base
from registry.bootstrap import DEFAULT_TENANT, bootstrap
from registry.database import Database
from registry.errors import Unavailable
from registry.manifests import VersionManifest
from registry.settings import Settings
from registry.stores import open_store
from registry.versions import insert_version
from workers.tether import tethered

START_SECONDS = 180.0
STOP_SECONDS = 30.0


@dataclass(frozen=True)
class Served:
    """A running service: its URL, its first process, and the versions it was given."""

    url: str
    pid: int
    versions: list[str]


@contextmanager
def serve(
    data: Path,
    bases: Sequence[Base],
    edits: Sequence[Mapping[str, Effect]],
    *,
    workers: int = 0,
    **settings: Any,
) -> Iterator[Served]:
    """A service until the end of the block; its engine has one thread, the other core is left to
    the front and the clients.

    Args:
        data: its folder.
        bases: what it serves.
        edits: effects by module path; each makes a version of the first base.
        workers: none where no jobs are measured: one loads its spare interpreter beside what is.
        settings: what else it is told.

    Raises:
        Unavailable: it did not start; shows the end of its log.
    """
    data.mkdir()
    chosen = Settings.apart(
        data,
        port=_free_port(),
        bases=",".join(f"{base.name}={base.folder}" for base in bases),
        engine_threads=1,
        workers=workers,
        worker_threads=1,
        **settings,
    )
    versions = _write_versions(chosen, bases, edits)
    log = data / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            tethered([sys.executable, "-m", "app.cli", "serve", "--quiet"]),
            env={**os.environ, **chosen.environment()},
            stdout=output,
            stderr=output,
        )
    url = f"http://127.0.0.1:{chosen.port}"
    try:
        _await_ready(url, process, log, "ready" if workers else "engine")
        yield Served(url, process.pid, versions)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def _write_versions(
    settings: Settings, bases: Sequence[Base], edits: Sequence[Mapping[str, Effect]]
) -> list[str]:
    """The ids of ready versions, written to the service's data as a worker would."""
    store = open_store(settings)
    base = bases[0]
    made = []
    with closing(Database(settings.sql_url)) as database:
        bootstrap(database, bases)
        for effects in edits:
            digest = store.put(Delta(effects, base.digest, "bench").to_bytes())
            manifest = VersionManifest(base.ref, (digest,), (VersionManifest(base.ref).id,))
            with database.write() as connection:
                made.append(insert_version(connection, DEFAULT_TENANT, manifest).id)
    return made


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _await_ready(url: str, process: subprocess.Popen[bytes], log: Path, part: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz", timeout=5).json()[part]:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    lines = log.read_text(errors="replace").splitlines()
    raise Unavailable("the service did not start; its log ends:\n" + "\n".join(lines[-15:]))
