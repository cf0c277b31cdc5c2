"""What is ready of a service of which only the database and the artifacts are there."""

import asyncio

import httpx
import pytest

from app.main import create_app
from app.services import Services


def ask(services: Services, query: str) -> httpx.Response:
    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(services.settings, services))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get(f"/readyz{query}")

    return asyncio.run(get())


@pytest.mark.parametrize(
    ("query", "ready"),
    [
        ("", False),
        ("?part=database&part=artifacts&part=service", True),
        ("?part=queue", False),
        ("?part=database&part=engine", False),
    ],
)
def test_it_is_ready_when_the_parts_that_are_asked_for_are(
    services: Services, query: str, ready: bool
) -> None:
    answer = ask(services, query)
    assert answer.status_code == (200 if ready else 503)
    told = answer.json()
    assert told["ready"] is ready
    assert told["reasons"].keys() == {"queue", "engine"}, "whatever was asked for"


def test_a_service_that_stops_is_not_ready(services: Services) -> None:
    services.gate.close()
    assert ask(services, "?part=service").status_code == 503
    assert ask(services, "?part=database").status_code == 200


def test_a_part_that_there_is_not_is_refused(services: Services) -> None:
    answer = ask(services, "?part=engine&part=motor")
    assert answer.status_code == 422
    assert answer.json()["error"]["message"].startswith("part.1: Input should be 'database'")
