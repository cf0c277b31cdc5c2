"""``/v1/endpoints``. The ETag is the generation; a change says which generation it changes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Annotated, Any

from fastapi import Header, Query, Response, status
from sqlalchemy import Connection

from app.endpoints.schemas import (
    EndpointBody,
    LiveEdit,
    MoveBody,
    PromoteBody,
    PutEndpoint,
    RollbackAnswer,
    RollbackBody,
    endpoint_body,
    live_edit,
    move_body,
    rollback_answer,
)
from app.errors import precondition_required
from app.schemas import BEYOND, Limit, ListOf, Name
from app.services import Caller, CallerDep, Services, ServicesDep
from app.strict import Router
from app.submission import check_unreserved
from registry import endpoints, moves, versions
from registry.edits import edited
from registry.endpoints import Endpoint
from registry.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
)
from registry.moves import Target

router = Router(prefix="/v1/endpoints", tags=["endpoints"])
_ETAG = Header(
    description='The endpoint\'s ETag, quoted: the generation, as in "3".',
    json_schema_extra={"pattern": r'^\s*"[0-9]{1,9}"\s*$'},
)
IfMatch = Annotated[str | None, _ETAG]
#: Where a change cannot do without; 428 says so.
RequiredIfMatch = Annotated[str, _ETAG]
IfNoneMatch = Annotated[
    str | None,
    Header(description="`*` to create the endpoint.", json_schema_extra={"pattern": r"^\s*\*\s*$"}),
]


@router.get("")
def list_endpoints(
    services: ServicesDep,
    caller: CallerDep,
    after: Annotated[str | None, Query(description="The last name of the page before.")] = None,
    limit: Limit = 20,
) -> ListOf[EndpointBody]:
    """Endpoints, by name."""
    with services.database.read() as connection:
        page = endpoints.list_endpoints(connection, caller.tenant, after=after, limit=limit)
    return ListOf(data=[endpoint_body(e) for e in page.items], has_more=page.has_more)


@router.get("/{name}")
def get_endpoint(
    name: Name, services: ServicesDep, caller: CallerDep, response: Response
) -> EndpointBody:
    """One endpoint: where it points, at which generation (the ETag)."""
    with services.database.read() as connection:
        endpoint = endpoints.get_endpoint(connection, caller.tenant, name)
    return _with_etag(endpoint, response)


@router.put(
    "/{name}",
    responses={201: {"model": EndpointBody, "description": "The endpoint was created."}},
)
def put_endpoint(
    name: Name,
    body: PutEndpoint,
    services: ServicesDep,
    caller: CallerDep,
    response: Response,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
) -> EndpointBody:
    """Move an endpoint (If-Match) or create one (If-None-Match: *)."""
    if if_none_match is not None:
        if if_none_match.strip() != "*" or if_match is not None:
            raise InvalidRequest(
                "If-None-Match must be * and stand without If-Match", param="If-None-Match"
            )
        check_unreserved(name, "name")
        with services.moving() as connection:
            _force(connection, caller, body)
            endpoint = endpoints.create_endpoint(
                connection,
                caller.tenant,
                name,
                body.state,
                actor=caller.actor,
                message=body.message,
            )
        response.status_code = status.HTTP_201_CREATED
        return _with_etag(endpoint, response)
    if if_match is None:
        raise precondition_required()
    generation = _generation(if_match)
    with services.moving() as connection:
        endpoints.endpoint_at(connection, caller.tenant, name, generation)
        _force(connection, caller, body)
        endpoint = endpoints.move_endpoint(
            connection,
            caller.tenant,
            name,
            body.state,
            generation=generation,
            kind="set",
            actor=caller.actor,
            message=body.message,
        )
    return _with_etag(endpoint, response)


@router.delete("/{name}", status_code=status.HTTP_204_NO_CONTENT)
def delete_endpoint(
    name: Name, services: ServicesDep, caller: CallerDep, if_match: RequiredIfMatch
) -> None:
    """Delete an endpoint; its versions and its history stay."""
    generation = _generation(if_match)
    with services.moving() as connection:
        endpoints.delete_endpoint(
            connection, caller.tenant, name, generation=generation, actor=caller.actor
        )


@router.post("/{name}/promote")
def promote_endpoint(
    name: Name,
    services: ServicesDep,
    caller: CallerDep,
    response: Response,
    if_match: RequiredIfMatch,
    body: PromoteBody | None = None,
) -> EndpointBody:
    """Give the whole of a split endpoint to one of its versions."""
    body = body or PromoteBody()
    generation = _generation(if_match)
    with services.moving() as connection:
        endpoint = endpoints.endpoint_at(connection, caller.tenant, name, generation)
        names = [target.version for target in endpoint.state]
        chosen = body.version or names[-1]
        if len(names) == 1 or chosen not in names:
            raise Conflict(
                f"endpoint {name!r} is at {', '.join(names)}; only one of a split's versions"
                " can be promoted",
                code="not_split",
            )
        endpoint = endpoints.move_endpoint(
            connection,
            caller.tenant,
            name,
            (Target(chosen),),
            generation=generation,
            kind="promote",
            actor=caller.actor,
            message=body.message,
        )
    return _with_etag(endpoint, response)


@router.post("/{name}/rollback")
def rollback_endpoint(
    name: Name,
    services: ServicesDep,
    caller: CallerDep,
    response: Response,
    body: RollbackBody | None = None,
    if_match: IfMatch = None,
) -> RollbackAnswer:
    """Restore the whole state that a move replaced. A second rollback goes further back."""
    body = body or RollbackBody()
    generation = None if if_match is None else _generation(if_match)
    with services.moving() as connection:
        before, after = endpoints.rollback_endpoint(
            connection,
            caller.tenant,
            name,
            actor=caller.actor,
            steps=body.steps or 1,
            to_version=body.to,
            to_generation=body.to_generation,
            generation=generation,
            message=body.message,
        )
    _with_etag(after, response)
    return rollback_answer(before, after)


@router.get("/{name}/history")
def get_history(
    name: Name,
    services: ServicesDep,
    caller: CallerDep,
    after: Annotated[
        int | None, Query(ge=1, lt=BEYOND, description="The last generation seen.")
    ] = None,
    limit: Limit = 20,
) -> ListOf[MoveBody]:
    """Every move of the endpoint, newest first."""
    with services.database.read() as connection:
        page = moves.history(connection, caller.tenant, name, after=after, limit=limit)
    if not page.items and after is None:
        raise NotFound(f"endpoint {name!r} does not exist", code="endpoint_not_found")
    return ListOf(data=[move_body(move) for move in page.items], has_more=page.has_more)


@router.get("/{name}/edits")
def get_edits(
    name: Name,
    services: ServicesDep,
    caller: CallerDep,
    subject: Annotated[str | None, Query(max_length=10_000)] = None,
    after: Annotated[Name | None, Query(description="The last id of the page before.")] = None,
    limit: Limit = 20,
) -> ListOf[LiveEdit]:
    """The edits that the endpoint's version carries, the newest job's first."""
    with services.database.read() as connection:
        endpoint = endpoints.get_endpoint(connection, caller.tenant, name)
        chain = versions.lineage(connection, caller.tenant, endpoint.head)
        reports = {v.id: versions.reports(connection, caller.tenant, v.id) for v in chain}
    holds = _holds(services, reports[endpoint.head])
    edits = (
        live_edit(version, delta, place, edit, reports[version.id], holds.get(version.id))
        for version, delta in edited(chain)
        for place, edit in enumerate(services.edits(version.manifest.recipe["edits"]))
        if subject is None or edit.get("subject", "") == subject
    )
    if after is not None and all(edit.id != after for edit in edits):
        raise NotFound(
            f"after: endpoint {name!r} has no live edit {after!r}; begin again without after",
            param="after",
        )
    page = list(islice(edits, limit + 1))
    return ListOf(data=page[:limit], has_more=len(page) > limit)


def _holds(services: Services, reports: Sequence[Mapping[str, Any]]) -> dict[str, list[bool]]:
    """Whether edits hold, by the version that made them: from the newest report that says so."""
    digest = next((report["holds"] for report in reversed(reports) if report.get("holds")), None)
    holds: dict[str, list[bool]] = {}
    return holds if digest is None else holds | json.loads(services.artifacts.get(digest))


def _force(connection: Connection, caller: Caller, body: PutEndpoint) -> None:
    if body.force:
        caller.require("admin", "force")
        endpoints.force_state(
            connection, caller.tenant, body.state, actor=caller.actor, message=body.message
        )


def _generation(if_match: str) -> int:
    found = re.fullmatch(r'\s*"([0-9]{1,9})"\s*', if_match)
    if found is None:
        raise InvalidRequest(
            f"If-Match is {if_match!r}; it must be the endpoint's ETag, a quoted generation"
            ' such as "3"',
            param="If-Match",
        )
    return int(found[1])


def _with_etag(endpoint: Endpoint, response: Response) -> EndpointBody:
    response.headers["ETag"] = f'"{endpoint.generation}"'
    return endpoint_body(endpoint)
