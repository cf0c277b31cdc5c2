"""A receiver of webhooks on this machine: a real server in a thread, which answers by the path."""

from __future__ import annotations

import ssl
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Received:
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass
class Receiver:
    """What came so far.

    Paths: ``/ok…`` 200, ``/500``, ``/gone`` 410, ``/redirect`` to ``/ok-redirected``, ``/flaky``
    500 twice for each message and then 200, ``/slow`` no answer until the end, ``/endless`` 200 and
    a body without end, ``/ssh`` what is not HTTP.
    """

    url: str
    requests: list[Received] = field(default_factory=list)
    connections: int = 0
    ending: threading.Event = field(default_factory=threading.Event)
    seen: Counter[str] = field(default_factory=Counter)

    def of(self, path: str) -> list[Received]:
        return [received for received in self.requests if received.path == path]


@contextmanager
def receiving(certificate: Path | None = None) -> Iterator[Receiver]:
    """Args: certificate: with its key, as PEM: the receiver speaks TLS by it."""

    class Handler(BaseHTTPRequestHandler):
        def setup(self) -> None:
            receiver.connections += 1
            super().setup()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.requests.append(Received(self.path, dict(self.headers), body))
            _answer(self, receiver)

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    scheme = "http"
    if certificate is not None:
        scheme, context = "https", ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    receiver = Receiver(f"{scheme}://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield receiver
    finally:
        receiver.ending.set()
        server.shutdown()
        thread.join()
        server.server_close()


def _answer(handler: BaseHTTPRequestHandler, receiver: Receiver) -> None:
    path = handler.path
    if path == "/ssh":
        handler.wfile.write(b"SSH-2.0-OpenSSH_9.2p1\r\n")
        return
    status = {"/500": 500, "/gone": 410, "/redirect": 302}.get(path, 200)
    if path == "/flaky":
        message = handler.headers["webhook-id"]
        receiver.seen[message] += 1
        status = 500 if receiver.seen[message] < 3 else 200
    if path == "/slow":
        receiver.ending.wait(60)
    handler.send_response(status)
    if path == "/redirect":
        handler.send_header("Location", f"{receiver.url}/ok-redirected")
    handler.send_header("Set-Cookie", "seen=1")
    handler.end_headers()
    try:
        while path == "/endless" and not receiver.ending.is_set():
            handler.wfile.write(b"x" * 65536)
    except OSError:
        pass  # the other side has heard enough
