"""Versions that each learnt another relation, merged by every method."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from benchmarks.merging.bench import Bench
from benchmarks.parts import Part
from editing.deltas import Delta
from editing.merging import MergeEntry

#: What a row holds, in the order it is shown; before them each relation's accuracy.
COLUMNS = {
    "mean": "mean",
    "old_facts_lost": "old lost",
    "seconds": "s",
    "peak_memory": "peak MB",
    "delta_bytes": "bytes",
}
Row = dict[str, Any]


def measure_tasks(bench: Bench) -> Part:
    """A row a version by itself, a row a merge of all of them (of the first ones, where a method
    takes fewer)."""
    rows = [
        {"method": f"{name} alone", **_asked(bench, delta)} for name, delta in bench.tuned.items()
    ]
    for entry in bench.merges:
        rows.append(_row(bench, entry))
        bench.console.log(f"tasks: {rows[-1]}")
    return Part({}, {"tasks": rows})


def _row(bench: Bench, entry: MergeEntry) -> Row:
    deltas = [*bench.tuned.values()][: entry.most]
    merged = bench.merged(entry, deltas)
    asked = _asked(bench, merged.delta)
    return {
        "method": entry.name,
        **asked,
        "mean": fmean(asked[name] for name in [*bench.tuned][: entry.most]),
        "seconds": merged.seconds,
        "peak_memory": merged.peak_memory,
    }


def _asked(bench: Bench, delta: Delta) -> Row:
    with bench.view.with_effects(delta.effects):
        found = {name: bench.right(name) for name in bench.tasks}
        lost = bench.old_lost()
    return {**found, "old_facts_lost": lost, "delta_bytes": len(delta.to_bytes())}
