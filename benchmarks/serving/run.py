"""Run the parts of the bench, and show what they found."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from benchmarks.serving.bench import Bench, Part
from benchmarks.serving.generation import measure_bfloat16, measure_generation, measure_invariance
from benchmarks.serving.http import measure_http, measure_swaps
from benchmarks.serving.limits import measure_limits
from benchmarks.serving.mixed import measure_memory, measure_mixed
from benchmarks.serving.prefill import measure_gpt2, measure_prefill
from benchmarks.serving.report import plot, table
from benchmarks.serving.workload import FULL, QUICK, Scale
from registry.errors import InvalidRequest
from serving.memory import keep_freed_memory

#: The parts in the order they run.
PARTS: Mapping[str, Callable[[Bench], Part]] = {
    "prefill": measure_prefill,
    "generate": measure_generation,
    "mixed": measure_mixed,
    "memory": measure_memory,
    "invariance": measure_invariance,
    "bfloat16": measure_bfloat16,
    "http": measure_http,
    "swaps": measure_swaps,
    "gpt2": measure_gpt2,
    "limits": measure_limits,
}
#: These run only where they are named; the limits on a GPU always.
OPTIONAL = ("gpt2",) if torch.cuda.is_available() else ("gpt2", "limits")


def run(
    scale: Scale, only: Sequence[str], threads: int, dtype: str, console: Console
) -> dict[str, Any]:
    """The figures by name, and the detail they come from.

    Raises:
        InvalidRequest: there is no part of that name.
    """
    chosen = only or [name for name in PARTS if name not in OPTIONAL]
    if unknown := [name for name in chosen if name not in PARTS]:
        raise InvalidRequest(f"--only: no part is called {unknown[0]!r}; there are {[*PARTS]}")
    torch.set_num_threads(threads)
    keep_freed_memory()  # as the engine does; the peers have it too
    figures: dict[str, float] = {}
    detail: dict[str, Any] = {
        "threads": threads,
        "dtype": dtype,
        "scale": asdict(scale),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "seconds": {},
    }
    with (
        tempfile.TemporaryDirectory(prefix="errata-bench-") as folder,
        Bench(scale, Path(folder), threads, dtype, console) as bench,
        console.status("") as status,
    ):
        for name in chosen:
            status.update(name)
            begun = time.perf_counter()
            part = PARTS[name](bench)
            detail["seconds"][name] = time.perf_counter() - begun
            figures |= part.figures
            detail |= part.detail
    return {"figures": figures, "detail": detail}


def main(
    json_file: Path | None = None,
    plot_file: Path | None = None,
    only: Sequence[str] = (),
    threads: int = 2,
    dtype: str = "float32",
    quick: bool = False,
) -> None:
    """Measure, print a table, and write JSON and a picture where files are named."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    console = Console(log_path=False)
    result = run(QUICK if quick else FULL, only, threads, dtype, console)
    figures, detail = result["figures"], result["detail"]
    console.print(table(figures, detail))
    console.print(f"took {sum(detail['seconds'].values()):.0f} s")
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")
    if plot_file is not None:
        plot(plot_file, figures, detail)
