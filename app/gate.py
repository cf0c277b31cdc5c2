"""The way into a service that is told to stop: what runs is finished, what comes is sent away."""

from __future__ import annotations

import asyncio
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import error_response
from registry.errors import Unavailable

#: What operators ask is answered to the end, and holds nothing up.
ALWAYS_OPEN = frozenset({"/healthz", "/readyz", "/metrics"})
RETRY_SECONDS = 5
#: Seconds in which a second signal is an echo of the first.
ECHO_SECONDS = 1.0


class Gate:
    """Whether requests are taken, and which are being worked on.

    Attributes:
        stopping: no more are taken.
        hurried: the service was told to stop a second time: what runs is not waited for.
        expired: what still runs is being ended.
        failed: something that the service cannot do without has failed, and it stops for that.
    """

    def __init__(self) -> None:
        self.stopping = False
        self.hurried = False
        self.expired = False
        self.failed = False
        self._closed_at = 0.0
        self._running: set[asyncio.Task[object]] = set()

    @property
    def running(self) -> int:
        """Requests that are being worked on."""
        return len(self._running)

    @property
    def closed_for(self) -> float:
        """Seconds since no more requests are taken; 0 while they are."""
        return time.monotonic() - self._closed_at if self.stopping else 0.0

    def close(self) -> None:
        """Take no more requests. May be called in a signal's handler."""
        if not self.stopping:
            self.stopping, self._closed_at = True, time.monotonic()
        elif time.monotonic() - self._closed_at > ECHO_SECONDS:
            self.hurried = True

    def fail(self) -> None:
        """Take no more requests, for the service does not work as it must."""
        self.failed = True
        if not self.stopping:
            self.close()

    def expire(self) -> None:
        """End what still runs: who has no answer yet gets an error, a stream is broken off."""
        self.expired = True
        for task in self._running:
            task.cancel()

    def enter(self) -> asyncio.Task[object]:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a request is worked on in a task")
        self._running.add(task)
        return task

    def leave(self, task: asyncio.Task[object]) -> None:
        self._running.discard(task)


def stopped() -> Unavailable:
    """What a request is told that the service has no more time for."""
    return Unavailable(
        "the service is stopping; send the request again, to another replica or in a few seconds",
        code="service_stopping",
        retry_after=RETRY_SECONDS,
    )


class Passage:
    """Lets requests through the gate, and answers those that it is closed to with 503."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in ALWAYS_OPEN:
            await self._app(scope, receive, send)
            return
        if self._gate.stopping:
            await _refuse(scope, receive, send)
            return
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        task = self._gate.enter()
        try:
            await self._app(scope, receive, noting)
        except asyncio.CancelledError:
            if begun or not self._gate.expired:
                raise
            task.uncancel()
            await _refuse(scope, receive, send)
        finally:
            self._gate.leave(task)


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    response = error_response(stopped())
    response.headers["Connection"] = "close"
    await response(scope, receive, send)
