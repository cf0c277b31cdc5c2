"""Errors to HTTP: every answer that is not a success has the one body of the contract."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.metrics.meters import Meters
from registry.errors import (
    ErrataError,
    InvalidRequest,
    NotFound,
    PreconditionRequired,
    TooLarge,
    Unavailable,
)
from registry.errors import UnprocessableRequest as Unprocessable
from registry.momentary import passes
from telemetry.logs import describe

logger = logging.getLogger("errata.api")
#: What an upload's body may hold beside the file: the parts' headers and the other fields.
FRAME_BYTES = 64 * 2**10


class ErrorDetail(BaseModel):
    """What was wrong, where, and what would be right."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    error: ErrorDetail


class Refused(HTTPException):
    """An error that FastAPI, while it reads a body, hands on as it is."""

    def __init__(self, error: InvalidRequest) -> None:
        super().__init__(error.status, error.message)
        self.error = error


#: The error answers that any route may give, for the OpenAPI document.
RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request was refused; the body says why."},
    "5XX": {"model": ErrorBody, "description": "The service could not answer."},
}


def error_response(error: ErrataError) -> JSONResponse:
    """Some tell OpenAI's client, which would retry a 409 or a 504, that a retry is useless."""
    headers: dict[str, str] = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (409, 410, 422, 504):
        headers["x-should-retry"] = "false"
    body = {name: _whole(value) for name, value in error.body().items()}
    return JSONResponse({"error": body}, error.status, headers)


def _whole(value: object) -> object:
    """A text that can be written: what a client sent may hold half of a surrogate pair."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def install(app: FastAPI, routes: Sequence[BaseRoute], meters: Meters) -> None:
    """Map the error tree, and what the frameworks raise, to the one body.

    ``routes`` are the API's; a 405 says which methods they have. What else is raised ends at
    ``app.observer``.
    """

    @app.exception_handler(ErrataError)
    async def errata_error(_: Request, error: ErrataError) -> JSONResponse:
        if error.status >= 500:
            cause = f" ({describe(error.__cause__)})" if error.__cause__ else ""
            logger.error("%s%s", error.message, cause)
        if error.status == 429:
            meters.refused.labels(error.code).inc()
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(_first_problem(error.errors()))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        response = error_response(_from_http(request, error))
        response.status_code = error.status_code
        response.headers.update(error.headers or {})
        if error.status_code == 405 and (methods := _allowed(request, routes)):
            response.headers["Allow"] = ", ".join(methods)
        return response

    @app.exception_handler(OSError)
    async def file_error(_: Request, error: OSError) -> JSONResponse:
        if not passes(error):
            raise error
        logger.error("the service's files: %s", describe(error))
        return error_response(
            Unavailable(
                "the service's files have no room or do not answer; try again", retry_after=5
            )
        )


def precondition_required() -> PreconditionRequired:
    """What a change without a precondition is told."""
    return PreconditionRequired(
        "a change needs If-Match with the endpoint's ETag (GET it first);"
        " a creation needs If-None-Match: *",
        param="If-Match",
    )


def _first_problem(problems: Any) -> ErrataError:
    first: Mapping[str, Any] = problems[0]
    if first["type"] == "missing" and first["loc"] == ("header", "if-match"):
        return precondition_required()
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    param = ".".join(where) or None
    if first["type"] == "extra_forbidden":
        return Unprocessable(f"{param} is not a known field here; leave it out", param=param)
    message = str(first["msg"]).removeprefix("Value error, ")
    more = f" ({len(problems) - 1} more problem(s) after it)" if len(problems) > 1 else ""
    return Unprocessable(f"{param or first['loc'][0]}: {message}{more}", param=param)


def _from_http(request: Request, error: HTTPException) -> ErrataError:
    if isinstance(error, Refused):
        return error.error
    if error.status_code == 404:
        return NotFound(f"{request.method} {request.url.path} does not exist; see /docs")
    if error.status_code == 405:
        return InvalidRequest(
            f"{request.method} is not allowed on {request.url.path}; see /docs",
            code="method_not_allowed",
        )
    if error.status_code == 413:
        return TooLarge(str(error.detail))
    return InvalidRequest(str(error.detail))


def _allowed(request: Request, routes: Sequence[BaseRoute]) -> list[str]:
    """The methods of what a path names; where several templates match, of the plainest one."""
    found: dict[str, set[str]] = {}
    for route in routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            found.setdefault(route.path, set()).update(route.methods or ())
    return sorted(found[min(found, key=lambda path: path.count("{"))]) if found else []


class BodyLimit:
    """Refuse a body that is too large: by its announced length, or once that much has come.

    An upload, which goes to disk and not to memory, has a limit of its own.
    """

    def __init__(self, app: ASGIApp, limit: int, upload_path: str, upload_limit: int) -> None:
        self._app = app
        self._limit = limit
        self._upload_path = upload_path
        self._upload_limit = upload_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"] == self._upload_path:
            limit = self._upload_limit + FRAME_BYTES
            said = f"the file has more than {self._upload_limit} bytes, the limit"
            error = TooLarge(f"{said} (ERRATA_MAX_FILE_BYTES)", param="file")
        else:
            limit = self._limit
            said = f"the request body has more than {limit} bytes, the limit"
            error = TooLarge(f"{said} (ERRATA_MAX_BODY_BYTES)")
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > limit:
            await error_response(error)(scope, receive, send)
            return
        come = 0

        async def counted() -> Message:
            nonlocal come
            message = await receive()
            come += len(message.get("body", b""))
            if come > limit:
                raise HTTPException(413, error.message)
            return message

        await self._app(scope, counted, send)
