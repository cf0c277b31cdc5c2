"""What is told of every request: its id, a line in the log, its count and its seconds."""

from __future__ import annotations

import logging
import time

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import error_response
from app.gate import ALWAYS_OPEN
from app.metrics.meters import Meters
from registry.errors import ErrataError
from telemetry.context import bound, request_id_of

logger = logging.getLogger("errata.api")
access = logging.getLogger("errata.access")
HEADER = "x-request-id"
#: The route of what no route was found for. A path may hold anything and is never told.
NO_ROUTE = "-"
METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
#: The status of a request whose connection ended before an answer began.
NO_STATUS = 499


class Observer:
    """Stands before everything else, so that its context and its counts hold all of a request.

    What nobody else has caught becomes a 500 here, where the request's id is still known.
    """

    def __init__(self, app: ASGIApp, meters: Meters) -> None:
        self._app = app
        self._meters = meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(HEADER.encode(), b"").decode("latin-1")
        request_id = request_id_of(given)
        begun = time.monotonic()
        status: int | None = None

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        with bound(request_id=request_id), self._meters.running.track_inprogress():
            try:
                await self._app(scope, receive, noting)
            except Exception as error:
                logger.error("%s %s failed", _method(scope), _route(scope), exc_info=error)
                if status is not None:
                    raise  # closes the connection: the answer is broken off
                response = error_response(
                    ErrataError("the service failed on this request; its log holds the reason")
                )
                await response(scope, receive, noting)
            finally:
                self._tell(scope, NO_STATUS if status is None else status, begun)

    def _tell(self, scope: Scope, status: int, begun: float) -> None:
        seconds = time.monotonic() - begun
        method, route = _method(scope), _route(scope)
        self._meters.requests.labels(method, route, status).inc()
        self._meters.request_seconds.labels(method, route).observe(seconds)
        told = {"method": method, "route": route, "status": status, "seconds": round(seconds, 6)}
        level = logging.DEBUG if route in ALWAYS_OPEN else logging.INFO
        text = "%s %s %d in %.1f ms"
        access.log(level, text, method, route, status, 1000 * seconds, extra=told)


def _method(scope: Scope) -> str:
    method: str = scope["method"]
    return method if method in METHODS else "OTHER"


def _route(scope: Scope) -> str:
    """The path that the matching route was declared with: ``/v1/jobs/{job_id}``."""
    return getattr(scope.get("route"), "path_format", NO_ROUTE)
