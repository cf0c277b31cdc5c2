"""Keep freed memory: a step takes and gives back the same large tensors again and again."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_… of <malloc.h>


#: What is larger than the first comes straight from the system; more than the second of free memory
#: at the heap's end goes back to it. These are what glibc itself settles on in a long process.
USUAL = 2**25, 2**26
KEPT = 2**30, 2**31 - 1


def keep_freed_memory(thresholds: tuple[int, int] = KEPT) -> None:
    """Let glibc's allocator reuse large blocks instead of returning them to the system.

    Otherwise every activation of a long step is fresh memory, zeroed page by page on first touch,
    about a tenth of such a step. The process keeps the memory of its largest step. Elsewhere than
    on glibc this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, size in zip((_MMAP_THRESHOLD, _TRIM_THRESHOLD), thresholds, strict=True):
            mallopt(parameter, size)
