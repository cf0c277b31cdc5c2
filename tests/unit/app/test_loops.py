"""A loop beside the requests that fails is told of, and stops the service."""

import asyncio
import logging

import pytest

from app.gate import Gate
from app.loops import running


async def forever() -> None:
    await asyncio.Event().wait()


async def failing() -> None:
    raise ZeroDivisionError


def test_a_loop_that_fails_closes_the_gate(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()

    async def serve() -> bool:
        async with running({"other": forever(), "dispatch": failing()}, gate), asyncio.timeout(10):
            while not gate.stopping:
                await asyncio.sleep(0)
        return True

    assert asyncio.run(serve()), "the rest is closed"
    assert gate.failed
    (told,) = [record for record in caplog.records if record.levelno == logging.CRITICAL]
    assert told.getMessage() == "dispatch failed, and the service stops"


def test_loops_end_with_the_service() -> None:
    gate, ended = Gate(), []

    async def noting() -> None:
        try:
            await forever()
        finally:
            ended.append(1)
            raise ZeroDivisionError

    async def serve() -> None:
        async with running({"collect": noting()}, gate):
            await asyncio.sleep(0)

    asyncio.run(serve())
    assert ended == [1]


def test_a_failure_while_the_service_stops_does_not_hurry_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.gate.ECHO_SECONDS", -1.0)
    gate = Gate()
    gate.close()
    gate.fail()
    assert (gate.failed, gate.hurried) == (True, False)
