"""Resident memory of every process of a service, as long as it runs.

Sizes are PSS: a page that n processes share counts 1/n in each, so that sizes add up. Work-horses
come and go with jobs, one waits while another works, and what they hold depends on how far a job
is: they count as one of their mean size over half a run.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

#: What tells a process's part by its command line; the API is the first of them all.
MARKS = {
    "queue": ("valkey-server", "redis-server"),
    "worker": ("app.cli worker",),
    "engine": ("-m serving",),
    "horse": ("workers.horse",),
}
ONE_OF_MANY = "horse"


@dataclass(frozen=True)
class Sample:
    """PSS in bytes of the processes of each part, and when, in seconds from the start."""

    at: float
    sizes: dict[str, list[int]]

    @property
    def lasting(self) -> int:
        """What all parts hold but the one that comes and goes."""
        return sum(sum(sizes) for part, sizes in self.sizes.items() if part != ONE_OF_MANY)

    def to_json(self) -> dict[str, Any]:
        return {"at": round(self.at, 1), **self.sizes}


async def watch(pid: int, pause: float, samples: list[Sample]) -> None:
    """Add a sample now and then until cancelled."""
    begun = time.perf_counter()
    while True:
        samples.append(await asyncio.to_thread(_sample, pid, time.perf_counter() - begun))
        await asyncio.sleep(pause)


def lasting(samples: Sequence[Sample], begin: float, end: float) -> float:
    """What lasts between two moments: the median."""
    return median(sample.lasting for sample in samples if begin <= sample.at <= end)


def passing(samples: Sequence[Sample], begin: float, end: float) -> float:
    """One of those that come and go between two moments: the mean; 0 where there is none."""
    seen = [sample.sizes.get(ONE_OF_MANY) for sample in samples if begin <= sample.at <= end]
    sizes = [mean(horses) for horses in seen if horses]
    return mean(sizes) if sizes else 0.0


def _sample(pid: int, at: float) -> Sample:
    sizes: dict[str, list[int]] = defaultdict(list)
    sizes["api"].append(_pss(pid))
    for child in _descendants(pid):
        with suppress(OSError):  # it ended meanwhile
            line = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            size = _pss(child)
            part = next((p for p, marks in MARKS.items() if any(m in line for m in marks)), "other")
            if size:
                sizes[part].append(size)
    return Sample(at, dict(sizes))


def _pss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in task.read_text().split():
                found += [int(child), *_descendants(int(child))]
    return found
