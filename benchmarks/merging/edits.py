"""Two disjoint sets of edits, each a version, merged by every method; and one version alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.merging.bench import Bench
from benchmarks.merging.workload import BEST, EDITOR
from benchmarks.parts import Part
from editing.deltas import Delta
from editing.merging import MergeEntry
from editing.methods import METHODS
from editing.metrics import Measurement, measure
from registry.manifests import EditRequest

COLUMNS = {
    "score_1": "S of the first",
    "score_2": "S of the second",
    "survival": "survival",
    "lost": "edits lost",
    "seconds": "s",
}
Row = dict[str, Any]


def measure_edits(bench: Bench) -> Part:
    """A row a merge. ``survival`` is the smaller share of a set's own S that the result has;
    ``lost`` counts the edits that held before."""
    count = bench.sizes.edits
    requests = bench.requests(bench.sizes.seed, 2 * count)
    sets = [requests[:count], requests[count:]]
    deltas = [bench.apply(METHODS[EDITOR], bench.task(METHODS[EDITOR], own))[0] for own in sets]
    before = [_measured(bench, own, delta) for own, delta in zip(sets, deltas, strict=True)]
    rows: list[Row] = []
    for entry in bench.merges:
        merged = bench.merged(entry, deltas)
        after = [_measured(bench, own, merged.delta) for own in sets]
        scores = [found.metrics.get("score", 0.0) for found in after]
        shares = [
            now / was.metrics["score"] if was.metrics.get("score") else 0.0
            for now, was in zip(scores, before, strict=True)
        ]
        rows.append(
            {
                "method": entry.name,
                "score_1": scores[0],
                "score_2": scores[1],
                "survival": min(shares),
                "lost": sum(
                    was and not is_
                    for then, now in zip(before, after, strict=True)
                    for was, is_ in zip(then.holds, now.holds, strict=True)
                ),
                "seconds": merged.seconds,
            }
        )
        bench.console.log(f"edits: {rows[-1]}")
    survival = [row["survival"] for row in rows if row["method"] == BEST]
    figures = dict(zip(["two_sets_survival"], survival, strict=False))
    own = [found.metrics.get("score", 0.0) for found in before]
    return Part(figures, {"edits": {"editor": EDITOR, "count": count, "own": own, "rows": rows}})


def measure_identity(bench: Bench) -> Part:
    """One version at weight 1 by every method that takes one, where nothing is dropped: the largest
    |ΔW' − ΔW| by the largest |ΔW|. PCB keeps the top of a version alone and has no row."""
    (name, delta), *_ = bench.tuned.items()
    rows: list[Row] = []
    for entry in bench.merges:
        if entry.least > 1 or entry.name == "pcb":
            continue
        merged = bench.merged(entry, [delta], everything(entry))
        rows.append({"method": entry.name, "error": _difference(bench, merged.delta, delta)})
    return Part(
        {"single_version_identity_error": max(row["error"] for row in rows)} if rows else {},
        {"identity": {"version": name, "rows": rows}},
    )


def everything(entry: MergeEntry) -> Mapping[str, float]:
    """Hyperparameters by which a method drops nothing."""
    kept = {"density": 1.0, "epsilon": 0.0, "gamma": 0.0}
    return {name: kept[name] for name in kept if name in entry.hyperparameters.model_fields}


def _difference(bench: Bench, found: Delta, wanted: Delta) -> float:
    largest = difference = 0.0
    for path, effect in wanted.effects.items():
        nothing = torch.zeros(bench.view.weight(path).shape)
        change, made = (one.weight(nothing) for one in (effect, found.effects[path]))
        largest = max(largest, float(change.abs().max()))
        difference = max(difference, float((made - change).abs().max()))
    return difference / largest


def _measured(bench: Bench, requests: list[EditRequest], delta: Delta) -> Measurement:
    with bench.view.with_effects(delta.effects):
        return measure(bench.view, requests)
