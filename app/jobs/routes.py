"""``/v1/jobs``."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated

from fastapi import Header, Query
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from app.gate import stopped
from app.jobs.schemas import JobBody, Status, job_body
from app.schemas import Limit, ListOf, Name
from app.services import Caller, CallerDep, Services, ServicesDep
from app.strict import Router
from registry import jobs
from registry.errors import InvalidRequest, Unavailable
from registry.jobs import Event

router = Router(prefix="/v1/jobs", tags=["jobs"])
POLL_SECONDS = 0.2
KEEPALIVE_SECONDS = 15.0


@router.get("")
def list_jobs(
    services: ServicesDep,
    caller: CallerDep,
    kind: str | None = None,
    status: Status | None = None,
    endpoint: Annotated[Name | None, Query()] = None,
    after: Annotated[str | None, Query(description="The last id of the page before.")] = None,
    limit: Limit = 20,
) -> ListOf[JobBody]:
    """Jobs, newest first."""
    with services.database.read() as connection:
        page = jobs.list_jobs(
            connection,
            caller.tenant,
            kind=kind,
            status=status,
            endpoint=endpoint,
            after=after,
            limit=limit,
        )
        data = [job_body(connection, job) for job in page.items]
    return ListOf(data=data, has_more=page.has_more)


@router.get("/{job_id}")
def get_job(job_id: Name, services: ServicesDep, caller: CallerDep) -> JobBody:
    """One job: status, progress, result."""
    with services.database.read() as connection:
        return job_body(connection, jobs.get_job(connection, caller.tenant, job_id))


@router.post("/{job_id}/cancel")
def cancel_job(job_id: Name, services: ServicesDep, caller: CallerDep) -> JobBody:
    """Cancel a queued job at once; ask a running one to stop at its next step."""
    with services.database.write() as connection:
        job = jobs.cancel_job(connection, caller.tenant, job_id, actor=caller.actor)
        return job_body(connection, job)


@router.get(
    "/{job_id}/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}, "description": "The job's events."}},
)
async def job_events(
    job_id: Name,
    services: ServicesDep,
    caller: CallerDep,
    last_event_id: Annotated[
        str | None,
        Header(
            description="Continue after this event's id.",
            json_schema_extra={"pattern": "^[0-9]{1,18}$"},
        ),
    ] = None,
) -> StreamingResponse:
    """The job's events as server-sent events, from the first (or Last-Event-ID) to its end.

    A service that stops ends it with an `error` event; go on from Last-Event-ID elsewhere.
    """
    if last_event_id is not None and not re.fullmatch("[0-9]{1,18}", last_event_id):
        raise InvalidRequest(
            f"Last-Event-ID is {last_event_id!r}; it must be the id of an event, a whole number",
            param="Last-Event-ID",
        )
    await run_in_threadpool(get_job, job_id, services, caller)
    stream = _stream(services, caller, job_id, int(last_event_id or 0))
    return StreamingResponse(
        stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


async def _stream(
    services: Services, caller: Caller, job_id: str, after: int
) -> AsyncIterator[str]:
    def read() -> tuple[list[Event], str]:
        with services.database.read() as connection:
            status = jobs.get_job(connection, caller.tenant, job_id).status
            return jobs.events(connection, job_id, after=after), status

    quiet = 0.0
    while True:
        try:
            events, status = await run_in_threadpool(read)
        except Unavailable:
            events, status = [], ""  # what happens meanwhile is told later
        for event in events:
            after = event.seq
            data = json.dumps({**asdict(event)["data"], "created_at": event.created_at})
            yield f"id: {event.seq}\nevent: {event.type}\ndata: {data}\n\n"
        has_ended = status in jobs.ENDED
        if has_ended and not events:
            return
        gate = services.gate
        if not has_ended and (gate.expired or (gate.stopping and status != jobs.RUNNING)):
            yield f"event: error\ndata: {json.dumps({'error': stopped().body()})}\n\n"
            return
        quiet = 0.0 if events else quiet + POLL_SECONDS
        if quiet >= KEEPALIVE_SECONDS:
            quiet = 0.0
            yield ": still there\n\n"
        await asyncio.sleep(POLL_SECONDS)
