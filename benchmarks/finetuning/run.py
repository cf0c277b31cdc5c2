"""Run the parts of the bench, and show what they found."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.atlas import run_on_atlas
from benchmarks.editing.report import WIDTH
from benchmarks.finetuning.bench import Bench
from benchmarks.finetuning.methods import measure_methods
from benchmarks.finetuning.packing import measure_packing
from benchmarks.finetuning.report import plot, tables
from benchmarks.finetuning.workload import FULL, QUICK, Scale
from benchmarks.parts import Part, check_names, write
from editing.datasets.training import PROMPTS
from editing.finetune.catalogue import SUPERVISED, TUNINGS

#: The parts in the order they run.
PARTS: Mapping[str, Callable[[Bench], Part]] = {
    "methods": measure_methods,
    "packing": measure_packing,
}

#: All but other names of one that is here already, and those that learn from rewards: nothing that
#: a model never says by itself is rewarded.
METHODS = [
    name
    for name, entry in TUNINGS.items()
    if name not in (SUPERVISED, "hut") and entry.rows != PROMPTS
]


def run(
    scale: Scale,
    only: Sequence[str],
    methods: Sequence[str],
    threads: int,
    device: str,
    console: Console,
    jobs: int = 1,
    kept: Path | None = None,
) -> dict[str, Any]:
    """The figures by name, and the detail they come from.

    Raises:
        InvalidRequest: there is no part or no method of that name; the file of rows that are kept
            is of other code or settings.
        JobFailed: a method wrote the base's weights.
    """
    check_names("--methods: no method", methods, METHODS)
    bench = Bench(scale, methods or METHODS, device, console, threads, jobs, kept=kept)
    libraries = ("torch", "transformers", "peft")
    return run_on_atlas(PARTS, only, bench, threads, libraries, jobs=jobs, scale=asdict(scale))


def main(
    json_file: Path | None = None,
    plot_file: Path | None = None,
    only: Sequence[str] = (),
    methods: Sequence[str] = (),
    threads: int = 1,
    device: str = "cpu",
    quick: bool = False,
    jobs: int | None = None,
    kept: Path | None = None,
) -> None:
    """Measure on atlas, print tables, and write JSON and a picture where files are named."""
    console = Console(log_path=False)
    at_once = jobs or (max(1, (os.cpu_count() or 1) // threads) if device == "cpu" else 1)
    scale = QUICK if quick else FULL
    result = run(scale, only, methods, threads, device, console, at_once, kept)
    figures, detail = result["figures"], result["detail"]
    if not console.is_terminal:
        console.width = max(WIDTH, console.width)
    for table in tables(figures, detail):
        console.print(table)
    console.print(f"took {sum(detail['seconds'].values()):.0f} s")
    write(json_file, result)
    if plot_file is not None:
        plot(plot_file, detail)
