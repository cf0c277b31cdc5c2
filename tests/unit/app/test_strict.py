"""Bodies on their way in."""

import asyncio
import json
from typing import Any

import pytest

from app.errors import Refused
from app.strict import LARGE, StrictRequest


def read(data: bytes) -> tuple[Any, bool]:
    """What a body holds, and whether others had their turn meanwhile."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": data, "more_body": False}

    async def reading() -> tuple[Any, bool]:
        turn = asyncio.Event()
        asyncio.get_running_loop().call_soon(turn.set)
        value = await StrictRequest({"type": "http", "headers": []}, receive).json()
        return value, turn.is_set()

    return asyncio.run(reading())


def test_a_large_body_does_not_hold_up_the_others() -> None:
    body = {"ids": list(range(LARGE))}
    assert read(json.dumps(body).encode()) == (body, True)
    assert read(b'{"a": 1}') == ({"a": 1}, False)
    with pytest.raises(Refused, match="twice"):
        read(b'{"a": 1, "a": "' + b"x" * LARGE + b'"}')
