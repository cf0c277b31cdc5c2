"""Settings of glibc's allocator: one for large steps, one for many threads."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # M_… of <malloc.h>


#: What is larger than the first comes straight from the system; more than the second of free memory
#: at the heap's end goes back to it. These are what glibc itself settles on in a long process.
USUAL = 2**25, 2**26
KEPT = 2**30, 2**31 - 1


def keep_freed_memory(thresholds: tuple[int, int] = KEPT) -> None:
    """Let glibc's allocator reuse large blocks instead of returning them to the system.

    A step takes and gives back the same large tensors again and again. Otherwise every activation
    of a long step is fresh memory, zeroed page by page on first touch, about a tenth of such a
    step. The process keeps the memory of its largest step. Elsewhere than on glibc this does
    nothing.
    """
    _set({_MMAP_THRESHOLD: thresholds[0], _TRIM_THRESHOLD: thresholds[1]})


def share_arenas(most: int = 2) -> None:
    """Let threads take their memory from so few places, which each keep the most they ever gave.

    By default there are eight a core: a process whose threads come and go grows for hours. Call it
    before they come. Elsewhere than on glibc this does nothing.
    """
    _set({_ARENA_MAX: most})


def _set(options: Mapping[int, int]) -> None:
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)
