"""Start a service, load it, look at it, and tell."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from benchmarks.load import report
from benchmarks.load.changes import Changes
from benchmarks.load.memory import Sample, watch
from benchmarks.load.traffic import Traffic
from benchmarks.load.workload import FULL, QUICK, Questions, Scale
from benchmarks.parts import finite, write
from benchmarks.serving.service import Served, serve
from registry.bases import find_bases
from registry.manifests import VersionManifest
from serving.runner import padded_rows

#: Ids of atlas's tokens that are plain text.
PLAIN_TOKENS = 300, 2000


def run(scale: Scale, console: Console) -> dict[str, Any]:
    """``{"figures": …, "detail": …}`` of a service of its own."""
    base = find_bases("atlas")["atlas"]
    settings: dict[str, Any] = {"kv_bytes": scale.kv_bytes, "covariance_tokens": 3000}
    console.log("starting the service")
    with (
        tempfile.TemporaryDirectory(prefix="errata-load-") as folder,
        serve(Path(folder) / "service", [base], [], workers=1, **settings) as served,
    ):
        first = VersionManifest(base.ref).id
        return asyncio.run(_load(scale, served, first, base.context_length, console))


async def _load(
    scale: Scale, served: Served, first: str, context_length: int, console: Console
) -> dict[str, Any]:
    questions = Questions()
    async with httpx.AsyncClient(base_url=served.url, timeout=120) as client:
        changes = Changes(client, scale, questions, [first])
        await changes.create_endpoints()
        console.log("the first edits, which prepare the base")
        for _ in range(scale.edited):
            await changes.edit()
        changes.edits.clear()
        console.log("a prompt of each length")
        await _ask_lengths(client, scale.endpoints[0], context_length)
        traffic = Traffic(served.url, scale, questions, changes.floors)
        samples: list[Sample] = []
        console.log(f"{scale.streams} streams for {scale.seconds:g} s")
        busy = time.process_time()
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(watch(served.pid, scale.sample_pause, samples))
            group.create_task(changes.keep_editing())
            group.create_task(changes.keep_moving())
            await traffic.run()
            busy = time.process_time() - busy
            watching.cancel()
            changes.stopping.set()
        await traffic.check_names(client)
    found = {
        "figures": report.figures(scale, traffic, changes, samples),
        "detail": report.detail(scale, traffic, changes, samples, busy),
    }
    result: dict[str, Any] = finite(found)
    return result


async def _ask_lengths(client: httpx.AsyncClient, model: str, context_length: int) -> None:
    """Have the engine compile its products for each number of rows up to a whole context.

    It does so for a number when it first comes up, and keeps them: else memory would rise for as
    long as there are rare ones that have not come up yet.
    """
    chance = random.Random(1)
    for rows in sorted({padded_rows(count) for count in range(1, context_length)}):
        prompt = [chance.randrange(*PLAIN_TOKENS) for _ in range(min(rows, context_length - 1))]
        body = {"model": model, "prompt": prompt, "max_tokens": 1}
        (await client.post("/v1/completions", json=body)).raise_for_status()


def main(
    json_file: Path | None = None, minutes: float = 10.0, streams: int = 64, quick: bool = False
) -> None:
    """Measure, print a table, and write JSON where a file is named."""
    console = Console(log_path=False)
    scale = QUICK if quick else FULL.within(60 * minutes, streams)
    result = run(scale, console)
    console.print(report.table(result["figures"], result["detail"]))
    for complaint in result["detail"]["told"]:
        console.print(complaint, style="red", highlight=False)
    write(json_file, result)
