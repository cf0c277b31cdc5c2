"""How a job's stream of events ends where the service is told to stop."""

import asyncio

import pytest

from app.jobs.routes import job_events
from app.services import Caller, Services
from registry import jobs
from registry.keys import SCOPES

TENANT = "default"


def submitted(services: Services) -> str:
    with services.database.write() as connection:
        return jobs.submit_job(
            connection, TENANT, "edit", base="atlas", request={}, actor="test"
        ).id


def streamed(services: Services, job_id: str) -> str:
    async def read() -> str:
        caller = Caller(TENANT, "test", SCOPES)
        answer = await job_events(job_id, services, caller)
        async with asyncio.timeout(30):
            return "".join([str(chunk) async for chunk in answer.body_iterator])

    return asyncio.run(read())


@pytest.mark.parametrize("expired", [False, True])
def test_the_events_of_a_job_that_ended_are_told_to_the_end(
    services: Services, expired: bool
) -> None:
    job_id = submitted(services)
    with services.database.write() as connection:
        jobs.cancel_job(connection, TENANT, job_id, actor="test")
    services.gate.close()
    services.gate.expired = expired
    told = streamed(services, job_id)
    assert '"cancelled"' in told
    assert "event: error" not in told


def test_the_events_of_a_job_that_waits_end_with_the_service(services: Services) -> None:
    job_id = submitted(services)
    services.gate.close()
    told = streamed(services, job_id)
    assert told.startswith("id: ")
    assert told.count("event: error") == 1
    assert "service_stopping" in told
