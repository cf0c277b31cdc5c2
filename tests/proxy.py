"""A way to a PostgreSQL server that can be cut at a chosen moment."""

from __future__ import annotations

import socket
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

_NAME = ".s.PGSQL.5432"


@dataclass
class Cut:
    """Where to cut, once.

    Attributes:
        at: what the client sends there.
        after: what it has sent before on the same connection.
        arrives: let the message reach the server, and its answer nobody.
        done: is set once it was cut.
    """

    at: bytes
    after: bytes = b""
    arrives: bool = False
    done: threading.Event = field(default_factory=threading.Event)


class Proxy:
    """Listens on a Unix socket in ``folder`` and passes everything on to the one in ``server``."""

    def __init__(self, server: Path) -> None:
        self._server = str(server / _NAME)
        self._cut: Cut | None = None
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="errata-way-")
        self.folder = Path(self._folder.name)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.folder / _NAME))
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._folder.cleanup()

    def cut(self, at: bytes, after: bytes = b"", *, arrives: bool = False) -> Cut:
        self._cut = Cut(at, after, arrives)
        return self._cut

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = socket.socket(socket.AF_UNIX)
        try:
            server.connect(self._server)
        except OSError:
            server.close()
            client.close()
            return
        silent = threading.Event()
        back = threading.Thread(target=self._back, args=(client, server, silent), daemon=True)
        back.start()
        sent = b""
        with suppress(OSError):
            while data := client.recv(2**16):
                sent += data
                cut = self._taken(sent, data)
                if cut is None:
                    server.sendall(data)
                    continue
                if cut.arrives:
                    silent.set()
                    server.sendall(data)
                    server.settimeout(5)
                    back.join(1)
                cut.done.set()
                break
        for end in (server, client):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _taken(self, sent: bytes, data: bytes) -> Cut | None:
        """The cut, if this is where to make it; nobody else makes it then."""
        with self._lock:
            cut = self._cut
            if cut is None or cut.at not in data or cut.after not in sent:
                return None
            self._cut = None
            return cut

    @staticmethod
    def _back(client: socket.socket, server: socket.socket, silent: threading.Event) -> None:
        with suppress(OSError):
            while data := server.recv(2**16):
                if silent.is_set():
                    return  # the answer came, and goes no further
                client.sendall(data)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)
