"""JSON bodies, read strictly: UTF-8, each key of an object once, whole characters.

What stands between a client and this service may read the first of two equal keys where Python
reads the last, and half of a surrogate pair can be kept by no database.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute

from app.errors import Refused
from app.services import BEARER, get_caller
from registry.errors import InvalidRequest, UnprocessableRequest

#: More keys than any object here has: each that is unknown would be a problem to be told.
MOST_KEYS = 5000
#: Deeper than any value here is, and far from where Python's recursion ends.
MOST_DEPTH = 100
#: Bytes of a body that is read beside the event loop.
LARGE = 64 * 2**10


class StrictRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            data = await self.body()
            is_large = len(data) > LARGE
            self._json = await run_in_threadpool(read_json, data) if is_large else read_json(data)
        return self._json


class StrictRoute(APIRoute):
    """A route whose body is read strictly, once it is known who sends it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if self.path.startswith("/v1/"):
                await get_caller(request, await BEARER(request))
            return await handler(StrictRequest(request.scope, request.receive))

        return handle


class Router(APIRouter):
    """Routes that read their bodies strictly."""

    def __init__(self, **options: Any) -> None:
        super().__init__(route_class=StrictRoute, **options)


def read_json(data: bytes) -> Any:
    """The value that a body holds.

    Raises:
        Refused: it is not JSON (400), or a text in it has half a character (422, names the field).
    """
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_once_each)
        if data.count(b"{") + data.count(b"[") > MOST_DEPTH:
            _check_depth(value)
        if b"\\ud" in data or b"\\uD" in data:
            _check_characters(value, ())
    except json.JSONDecodeError as error:
        raise _not_json(f"{error.msg} (line {error.lineno}, column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise _not_json(f"byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise _not_json("it is nested too deeply") from None
    except ValueError as error:
        raise _not_json(str(error)) from None
    return value


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MOST_KEYS:
        raise ValueError(f"an object has {len(pairs)} keys; the most is {MOST_KEYS}")
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name[:80]!r} stands twice in one object")
        found[name] = value
    return found


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MOST_DEPTH):
        containers = [one for one in level if isinstance(one, dict | list)]
        level = [
            inner
            for one in containers
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {MOST_DEPTH} levels deep")


def _check_characters(value: Any, place: Sequence[str]) -> None:
    """Raises Refused at the first text that cannot be written as UTF-8."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_characters(name, place)
            _check_characters(inner, (*place, name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _check_characters(inner, (*place, str(number)))
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            param = ".".join(place) or None
            raise Refused(
                UnprocessableRequest(
                    f"{param or 'body'} holds half of a surrogate pair; write whole characters",
                    param=param,
                )
            ) from None


def _not_json(reason: str) -> Refused:
    return Refused(InvalidRequest(f"the body is not valid JSON: {reason}", code="invalid_json"))
