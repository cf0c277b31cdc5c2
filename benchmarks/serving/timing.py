"""Take turns: a rival, ours, the rival, ours … on fresh prompts, and the median of the ratios."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch

from serving.memory import USUAL, keep_freed_memory

#: Seconds from which on a single run tells which variant is the quickest.
LONG = 3.0
#: Bytes of a heap that has served a step of this bench.
HEAP = 2**28

Prompts = list[list[int]]
#: Prompts in, the greedy tokens of each out; nothing out where only products are timed.
Contestant = Callable[[Prompts], list[list[int]]]
#: New prompts at each call, of the same lengths: a cache of prefixes has nothing to reuse.
Draw = Callable[[], Prompts]


@dataclass
class Duel:
    """Seconds of a rival's runs and of ours between them, and how many prompts ended alike."""

    rival: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    equal_prompts: int = 0
    compared_prompts: int = 0

    @property
    def ratio(self) -> float:
        """How many times faster ours is: the median over the pairs of runs."""
        return median(rival / ours for rival, ours in zip(self.rival, self.ours, strict=True))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


@contextmanager
def usual_memory() -> Iterator[None]:
    """Libraries run with the allocator as it comes; the engine sets it up for itself."""
    keep_freed_memory(USUAL)
    try:
        yield
    finally:
        keep_freed_memory()
        torch.empty(HEAP, dtype=torch.uint8).fill_(0)  # what an engine at work would have kept


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Spare a client's clock the collector's walks over all that this process holds by now."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def duel(
    rival: Contestant,
    ours: Contestant,
    draw: Draw,
    rounds: int,
    *,
    is_warm: bool = False,
    is_library: bool = True,
) -> Duel:
    """``rounds`` pairs of runs, each on its own prompts, after a run of each that does not count.

    Args:
        rival: runs first in every pair.
        ours: runs second.
        draw: gives the prompts.
        rounds: how many pairs count.
        is_warm: the rival ran already.
        is_library: the rival is another library, not the engine's own parts.
    """
    around = usual_memory if is_library else nullcontext
    if not is_warm:
        with around():
            rival(draw())
    ours(draw())
    result = Duel()
    for _ in range(rounds):
        prompts = draw()
        with around():
            rival_seconds, expected = timed(rival, prompts)
        our_seconds, found = timed(ours, prompts)
        result.rival.append(rival_seconds)
        result.ours.append(our_seconds)
        if expected and found:
            pairs = zip(expected, found, strict=True)
            result.equal_prompts += sum(theirs == own for theirs, own in pairs)
            result.compared_prompts += len(found)
    return result


def fastest(variants: Mapping[str, Contestant], draw: Draw) -> tuple[str, dict[str, float]]:
    """The name of a rival's quickest variant, and the seconds of each.

    A run of less than ``LONG`` seconds is repeated: the first one also warms up.
    """
    seconds = {}
    with usual_memory():
        for name, variant in variants.items():
            seconds[name] = timed(variant, draw())[0]
            if seconds[name] < LONG:
                seconds[name] = timed(variant, draw())[0]
    return min(seconds, key=lambda name: seconds[name]), seconds


def timed(contestant: Contestant, prompts: Prompts) -> tuple[float, list[list[int]]]:
    """Seconds of one run, and its tokens. Python's garbage is collected between runs only."""
    gc.disable()
    try:
        started = time.perf_counter()
        tokens = contestant(prompts)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started, tokens
    finally:
        gc.enable()
