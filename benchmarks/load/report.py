"""What a run under load found, as figures, detail and a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean, quantiles
from typing import Any

from rich.table import Table

from benchmarks.load.changes import Changes
from benchmarks.load.memory import MARKS, Sample, lasting, passing
from benchmarks.load.traffic import Traffic
from benchmarks.load.workload import Scale

#: Memory is compared with what it was this long after the start: all is loaded, caches are full.
SETTLED_SECONDS = 120.0
#: Half the time over which a size is taken, as a share of the run.
WINDOW = 0.05


def figures(scale: Scale, traffic: Traffic, changes: Changes, samples: Sequence[Sample]) -> Any:
    p50, p95, p99 = percentiles_ms(traffic.seconds)
    return {
        "requests": traffic.requests,
        "errors": traffic.wrong.total() + len(changes.errors),
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "memory_growth": growth(scale, samples),
    }


def growth(scale: Scale, samples: Sequence[Sample]) -> float:
    """The service's memory at the end over that at minute 2 (of a short run: at a fifth)."""
    begin, end = memory(scale, samples)
    return end / begin


def memory(scale: Scale, samples: Sequence[Sample]) -> tuple[float, float]:
    """Bytes at minute 2 (of a short run: at a fifth) and at the end.

    What lasts is taken in a window about the moment, and work-horses over the half of the run that
    it lies in, for a window sees but one or two of them.
    """
    settled, half = min(SETTLED_SECONDS, scale.seconds / 5), scale.seconds * WINDOW
    middle = scale.seconds / 2
    return (
        lasting(samples, settled - half, settled + half) + passing(samples, 0, middle),
        lasting(samples, scale.seconds - 2 * half, scale.seconds)
        + passing(samples, middle, scale.seconds),
    )


def detail(
    scale: Scale, traffic: Traffic, changes: Changes, samples: Sequence[Sample], busy: float
) -> dict[str, Any]:
    """Args: busy: seconds of CPU that the client took."""
    names = ("p50", "p95", "p99")
    return {
        "scale": asdict(scale),
        "kinds": dict(traffic.kinds),
        "tokens": traffic.tokens,
        "tokens_per_second": traffic.tokens / scale.seconds,
        "first_event_ms": dict(zip(names, percentiles_ms(traffic.first), strict=True)),
        "between_events_ms": dict(zip(names, percentiles_ms(traffic.gaps), strict=True)),
        "swaps": changes.moves.total(),
        "moves": dict(changes.moves),
        "moves_refused": dict(changes.refused),
        "edits": len(changes.edits),
        "edits_activated": sum(activated for _, activated in changes.edits),
        "edit_seconds": fmean(seconds for seconds, _ in changes.edits) if changes.edits else None,
        "wrong": dict(traffic.wrong),
        "told": [*traffic.told, *changes.errors],
        "client_cpu_share": busy / scale.seconds,
        "memory_bytes": memory(scale, samples),
        "memory": [sample.to_json() for sample in samples],
    }


def percentiles_ms(seconds: Sequence[float]) -> tuple[float, float, float]:
    """The 50th, 95th and 99th percentile, in ms."""
    if len(seconds) < 2:
        return (float("nan"),) * 3
    cuts = quantiles(seconds, n=100, method="inclusive")
    return 1000 * cuts[49], 1000 * cuts[94], 1000 * cuts[98]


def table(figures: dict[str, Any], detail: dict[str, Any]) -> Table:
    shown = Table("", "", title="Under load")
    shown.columns[1].justify = "right"
    for name in figures:
        shown.add_row(name.replace("_", " "), f"{figures[name]:.5g}")
    for name in ("tokens_per_second", "swaps", "edits", "client_cpu_share"):
        shown.add_row(name.replace("_", " "), f"{detail[name]:.4g}")
    begin, end = detail["memory"][0], detail["memory"][-1]
    for part in ("api", *MARKS, "other"):
        sizes = [sum(sample.get(part, ())) / 2**20 for sample in (begin, end)]
        if any(sizes):
            shown.add_row(f"{part}, MiB at first, at last", f"{sizes[0]:.0f}, {sizes[1]:.0f}")
    return shown
