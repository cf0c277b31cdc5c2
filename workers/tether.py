"""A process that dies with its parent: ``python -m workers.tether <parent pid> -- command…``.

On Linux the kernel does it: ``prctl(PR_SET_PDEATHSIG, SIGKILL)``, which survives ``exec``.
Elsewhere a small watcher process asks four times a second whether the parent's pid still exists.

The kernel's signal fires when the *thread* that created the child ends, not only when the process
does: spawn tethered children from a thread that lives as long as the process (the main thread).
The tether is not inherited: a tethered child's own children need tethers of their own.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
_WATCH_SECONDS = 0.25
_PARENT_GONE = 125
_CANNOT_RUN = 127


def tethered(command: Sequence[str]) -> list[str]:
    """The argv of ``command`` as a child that dies with this process; the child keeps its pid.

    Spawn it from the main thread (see the module's docstring).
    """
    script = os.path.abspath(__file__)  # by its path: it runs in any folder, without site-packages
    return [sys.executable, "-I", "-S", script, str(os.getpid()), "--", *command]


def tie_to_parent(parent: int) -> None:
    """Ties this process to ``parent``, the pid that spawned it: SIGKILL when that one dies.

    Call it first of all, while the process has one thread. Exits at once (status 125) if the parent
    has died already.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"prctl(PR_SET_PDEATHSIG): {os.strerror(code)}")
    else:
        _watch(parent)
    if os.getppid() != parent:
        sys.stderr.write(f"workers.tether: parent {parent} is gone, process {os.getpid()} ends\n")
        sys.stderr.flush()
        os._exit(_PARENT_GONE)


def _watch(parent: int) -> None:
    """Forks a watcher that kills this process once ``parent`` is gone, and ends with it."""
    watched = os.getpid()
    if os.fork():
        return
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    os.closerange(0, 256)
    while os.getppid() == watched:
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            os.kill(watched, signal.SIGKILL)
            break
        time.sleep(_WATCH_SECONDS)
    os._exit(0)


def main(argv: Sequence[str]) -> int:
    """Ties this process to its parent and becomes the command."""
    if len(argv) < 3 or argv[1] != "--" or not argv[0].isdecimal():
        sys.stderr.write("usage: python -m workers.tether <parent pid> -- command [argument…]\n")
        return 2
    tie_to_parent(int(argv[0]))
    command = list(argv[2:])
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"workers.tether: cannot run {command[0]}: {error.strerror}\n")
        return _CANNOT_RUN


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
