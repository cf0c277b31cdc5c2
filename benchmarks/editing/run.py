"""Run the parts of the bench, and show what they found."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.editing.behaviour import measure_behaviour
from benchmarks.editing.bench import Bench, Part
from benchmarks.editing.many import measure_batches, measure_sequences
from benchmarks.editing.report import WIDTH, finite, plot, tables
from benchmarks.editing.single import measure_rome, measure_single
from benchmarks.editing.targets import measure_targets
from benchmarks.editing.workload import BEST, FULL, QUICK, Scale
from editing.methods import METHODS
from editing.models.loading import weights_digest
from registry.bases import find_bases
from registry.errors import InvalidRequest, JobFailed

#: The parts in the order they run.
PARTS: Mapping[str, Callable[[Bench], Part]] = {
    "rome": measure_rome,
    "single": measure_single,
    "batch": measure_batches,
    "sequential": measure_sequences,
    "targets": measure_targets,
    "behaviour": measure_behaviour,
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
        JobFailed: a method wrote the base's weights.
    """
    _check("--only: no part", only, PARTS)
    _check("--methods: no method", methods, METHODS)
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    bench = Bench(find_bases("atlas")["atlas"], scale, methods or [*METHODS], device, console)
    figures: dict[str, float] = {}
    detail: dict[str, Any] = {
        "base": {"name": bench.base.name, "digest": bench.base.digest},
        "best": BEST,
        "threads": threads,
        "device": device,
        "scale": asdict(scale),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "seconds": {},
    }
    try:
        untouched = weights_digest(bench.view.model)
        with console.status("preparing the base") as status:
            bench.show(status)
            for name in only or PARTS:
                begun = time.perf_counter()
                part = PARTS[name](bench)
                detail["seconds"][name] = time.perf_counter() - begun
                figures |= part.figures
                detail |= part.detail
        if weights_digest(bench.view.model) != untouched:
            raise JobFailed("the base's weights changed during the benchmark")
    finally:
        torch.set_num_threads(usual)
    return {"figures": finite(figures), "detail": finite(detail)}


def main(
    json_file: Path | None = None,
    plot_file: Path | None = None,
    only: Sequence[str] = (),
    methods: Sequence[str] = (),
    threads: int = 2,
    device: str = "cpu",
    quick: bool = False,
    patience: float | None = None,
) -> None:
    """Measure on atlas, print tables, and write JSON and a picture where files are named."""
    console = Console(log_path=False)
    scale = QUICK if quick else FULL
    if patience is not None:
        scale = replace(scale, patience=patience)
    result = run(scale, only, methods, threads, device, console)
    figures, detail = result["figures"], result["detail"]
    if not console.is_terminal:
        console.width = max(WIDTH, console.width)
    for table in tables(figures, detail):
        console.print(table)
    console.print(f"took {sum(detail['seconds'].values()):.0f} s")
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    if plot_file is not None:
        plot(plot_file, detail)


def _check(what: str, asked: Sequence[str], known: Mapping[str, Any]) -> None:
    if unknown := [name for name in asked if name not in known]:
        raise InvalidRequest(f"{what} is called {unknown[0]!r}; there are {[*known]}")
