"""The engine's numbers and SQL's as families of metrics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from registry.counts import Counts
from serving.status import BaseStatus, EngineStatus

#: Of each base: the metric, what it says, and where the number stands.
GAUGES = (
    ("errata_engine_requests_running", "Completions that steps compute.", "running"),
    ("errata_engine_requests_waiting", "Completions that wait for their first step.", "waiting"),
)
COUNTERS = (
    ("errata_engine_prompt_tokens", "Tokens of prompts that were answered.", "prompt_tokens"),
    ("errata_engine_completion_tokens", "Tokens that were chosen.", "completion_tokens"),
    (
        "errata_engine_prefix_cache_hit_tokens",
        "Of the prompts' tokens, those that the prefix cache had.",
        "cached_tokens",
    ),
    (
        "errata_engine_preemptions",
        "Completions that gave their blocks back and were computed again.",
        "preempted",
    ),
)
BLOCKS = (
    ("errata_engine_kv_blocks", "Blocks of keys and values that there are.", "kv_tokens"),
    ("errata_engine_kv_blocks_used", "Blocks that completions hold.", "kv_used"),
    ("errata_engine_kv_blocks_cached", "Blocks in the prefix cache, held or not.", "kv_cached"),
)
HISTOGRAMS = (
    ("errata_engine_step_tokens", "Tokens of a step: prompts' and next ones.", "step_tokens"),
    ("errata_engine_step_seconds", "Seconds of a step.", "step_seconds"),
)
BY_BASE = ("base",)


def engine_families(status: EngineStatus | None) -> Iterator[Metric]:
    """The engine's numbers; without an engine their names alone."""
    up = "Whether the engine answers."
    yield GaugeMetricFamily("errata_engine_up", up, value=int(status is not None))
    bases = () if status is None else status.bases
    for name, told, field in GAUGES:
        yield _of_bases(GaugeMetricFamily(name, told, labels=BY_BASE), bases, field)
    for name, told, field in COUNTERS:
        yield _of_bases(CounterMetricFamily(name, told, labels=BY_BASE), bases, field)
    for name, told, field in BLOCKS:
        family = GaugeMetricFamily(name, told, labels=BY_BASE)
        for base in bases:
            family.add_metric([base.name], getattr(base, field) // base.kv_block)
        yield family
    for name, told, field in HISTOGRAMS:
        histogram = HistogramMetricFamily(name, told, labels=BY_BASE)
        for base in bases:
            found = getattr(base, field)
            histogram.add_metric([base.name], found.cumulative(), found.total)
        yield histogram
    yield from _versions(status)


def _versions(status: EngineStatus | None) -> Iterator[Metric]:
    count = GaugeMetricFamily(
        "errata_engine_versions_resident", "Versions whose effects are in memory.", labels=BY_BASE
    )
    size = GaugeMetricFamily(
        "errata_engine_versions_resident_bytes", "Bytes of those effects.", labels=BY_BASE
    )
    loads = HistogramMetricFamily(
        "errata_engine_version_load_seconds", "Seconds from a version's request to its effects."
    )
    failed = CounterMetricFamily(
        "errata_engine_version_loads_failed", "Versions that could not be loaded.", labels=()
    )
    if status is not None:
        for base in status.bases:
            held = [version for version in status.versions if version.base == base.name]
            count.add_metric([base.name], len(held))
            size.add_metric([base.name], sum(version.nbytes for version in held))
        loads.add_metric([], status.loads.cumulative(), status.loads.total)
        failed.add_metric([], status.failed_loads)
    yield from (count, size, loads, failed)


def _of_bases(
    family: GaugeMetricFamily | CounterMetricFamily, bases: Iterable[BaseStatus], field: str
) -> Metric:
    for base in bases:
        family.add_metric([base.name], getattr(base, field))
    return family


def record_families(counts: Counts | None, now: float) -> Iterator[Metric]:
    """SQL's numbers; without a database their names alone."""
    up = "Whether the database answers."
    yield GaugeMetricFamily("errata_database_up", up, value=int(counts is not None))
    jobs = GaugeMetricFamily(
        "errata_jobs", "Jobs by kind and status, ended ones too.", labels=("kind", "status")
    )
    age = GaugeMetricFamily(
        "errata_queue_age_seconds",
        "Seconds since the oldest job was posted that waits for a worker alone; 0 without one.",
        labels=(),
    )
    lost = CounterMetricFamily(
        "errata_attempts_lost", "Attempts at jobs whose worker died.", labels=()
    )
    rejections = CounterMetricFamily(
        "errata_guard_rejections", "Versions that a guard rejected.", labels=("guard",)
    )
    moves = CounterMetricFamily("errata_endpoint_moves", "Moves of endpoints.", labels=("kind",))
    if counts is not None:
        for (kind, status), count in sorted(counts.jobs.items()):
            jobs.add_metric([kind, status], count)
        oldest = counts.oldest_due
        age.add_metric([], 0.0 if oldest is None else max(0.0, now - oldest))
        lost.add_metric([], counts.lost_attempts)
        for guard, count in sorted(counts.rejections.items()):
            rejections.add_metric([guard], count)
        for kind, count in sorted(counts.moves.items()):
            moves.add_metric([kind], count)
    yield from (jobs, age, lost, rejections, moves)
