"""What the log is told of an answer that is the service's own fault."""

import asyncio
import logging

import httpx
import pytest
from fastapi import FastAPI

from app import errors
from app.metrics.meters import Meters
from registry.errors import ErrataError


@pytest.mark.parametrize(
    ("cause", "told"),
    [
        (None, "it cannot be read"),
        (OSError("disk on fire"), "it cannot be read (OSError: disk on fire)"),
        (KeyError("what a user sent"), "it cannot be read (KeyError)"),
    ],
)
def test_a_failure_is_logged_once_with_its_cause(
    cause: Exception | None, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = FastAPI()
    errors.install(app, [], Meters())

    @app.get("/")
    def failing() -> None:
        raise ErrataError("it cannot be read") from cause

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://errata") as client:
            return await client.get("/")

    answer = asyncio.run(ask())
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "it cannot be read"
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR] == [told]
