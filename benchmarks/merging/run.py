"""Run the parts of the bench, and show what they found."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.atlas import run_on_atlas
from benchmarks.editing.report import WIDTH
from benchmarks.merging.bench import Bench
from benchmarks.merging.edits import measure_edits, measure_identity
from benchmarks.merging.exchange import measure_exchange
from benchmarks.merging.report import tables
from benchmarks.merging.tasks import measure_tasks
from benchmarks.merging.workload import BEST, FULL, QUICK, Scale
from benchmarks.parts import Part, check_names, write
from editing.merging import MERGES

#: The parts in the order they run.
PARTS: Mapping[str, Callable[[Bench], Part]] = {
    "tasks": measure_tasks,
    "edits": measure_edits,
    "identity": measure_identity,
    "exchange": measure_exchange,
}


def run(
    scale: Scale,
    only: Sequence[str],
    methods: Sequence[str],
    threads: int,
    device: str,
    console: Console,
) -> dict[str, Any]:
    """The figures by name, and the detail they come from.

    Raises:
        InvalidRequest: there is no part or no method of that name.
        JobFailed: something wrote the base's weights.
    """
    check_names("--methods: no method", methods, MERGES)
    with tempfile.TemporaryDirectory(prefix="errata-bench-") as folder:
        bench = Bench(scale, methods or [*MERGES], device, console, threads, Path(folder))
        libraries = ("torch", "transformers", "peft")
        return run_on_atlas(PARTS, only, bench, threads, libraries, best=BEST, scale=asdict(scale))


def main(
    json_file: Path | None = None,
    only: Sequence[str] = (),
    methods: Sequence[str] = (),
    threads: int = 2,
    device: str = "cpu",
    quick: bool = False,
) -> None:
    """Measure on atlas, print tables, and write JSON where a file is named."""
    console = Console(log_path=False)
    result = run(QUICK if quick else FULL, only, methods, threads, device, console)
    figures, detail = result["figures"], result["detail"]
    if not console.is_terminal:
        console.width = max(WIDTH, console.width)
    for table in tables(figures, detail):
        console.print(table)
    console.print(f"took {sum(detail['seconds'].values()):.0f} s")
    write(json_file, result)
