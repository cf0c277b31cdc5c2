"""From a request to change a history to its job: what can be wrong is said before it exists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection

from app.history.schemas import DiffFile, Flatten, Replay, Revert
from app.services import Caller, Services
from app.submission import (
    NamedFiles,
    Submit,
    check_unreserved,
    guard_files,
    guard_request,
    head_of,
    prepare_missing,
    read_rows,
)
from registry import endpoints, files, jobs, versions
from registry.bases import Base, base_of
from registry.errors import Conflict, NotFound, UnprocessableRequest
from registry.files import File
from registry.history import recipes, removal
from registry.jobs import Job
from registry.manifests import EditRequest, VersionManifest
from registry.moves import Target
from registry.versions import Version
from workers.contents import read_contents
from workers.inputs import check_edits
from workers.recipes import TEXTS, check_edit, check_rows, find_method, find_tuning

#: What a file may be for that versions are compared on.
COMPARED = ("facts", "edits", "texts")


def check_flatten(services: Services, caller: Caller, version_id: str, body: Flatten) -> Submit:
    """Raises ErrataError, which names what is wrong; nothing is left behind."""
    with services.database.read() as connection:
        version = _version(connection, caller, version_id, body.endpoint)
    base = base_of(services.bases, version.id, version.manifest.base)
    stack = version.manifest.stack
    if len(stack) < 2:
        raise UnprocessableRequest(
            f"version {version.id} has {len(stack)} delta(s); there is nothing to flatten",
            code="nothing_to_flatten",
        )
    _check_open(services, stack)
    request = body.model_dump(include={"endpoint", "activate", "message"})

    def submit(connection: Connection) -> Job:
        return _submitted(connection, caller, "flatten", base, version, body.endpoint, request)

    return submit


def check_revert(services: Services, caller: Caller, version_id: str, body: Revert) -> Submit:
    """Raises ErrataError, which names what is wrong; nothing is left behind."""
    named = NamedFiles(guard_files(body.guards))
    with services.database.read() as connection:
        version = _version(connection, caller, version_id, body.endpoint)
        chain = versions.lineage(connection, caller.tenant, version.id)
        rows = named.rows(connection, caller)
    base = base_of(services.bases, version.id, version.manifest.base)
    found = removal(chain, delta=body.delta, version=body.version, replay=body.replay)
    needed = _needed(services, base, found.later) if body.replay else frozenset({TEXTS})
    request = {
        **body.model_dump(include={"delta", "version", "replay"}),
        **body.model_dump(include={"endpoint", "activate", "message"}),
        "guards": guard_request(services, base, body.guards, rows),
        "files": named.ids,
    }

    def submit(connection: Connection) -> Job:
        named.rows(connection, caller)
        after = prepare_missing(connection, services, caller, base, needed)
        return _submitted(
            connection, caller, "revert", base, version, body.endpoint, request, after
        )

    return submit


def check_replay(services: Services, caller: Caller, name: str, body: Replay) -> Submit:
    """Raises ErrataError, which names what is wrong; nothing is left behind."""
    named = NamedFiles(guard_files(body.guards))
    base = services.bases.get(body.base)
    if base is None:
        raise NotFound(
            f"base {body.base!r} does not exist; there is {', '.join(services.bases)}",
            param="base",
            code="base_not_found",
        )
    if body.onto == name:
        raise UnprocessableRequest(
            f"onto: endpoint {name!r} is the one that is replayed; name another one", param="onto"
        )
    with services.database.read() as connection:
        source = head_of(connection, caller, name, "name")
        chain = versions.lineage(connection, caller.tenant, source.id)
        _check_onto(connection, caller, base, body.onto)
        rows = named.rows(connection, caller)
    again = recipes(chain, "name")
    if not again:
        raise UnprocessableRequest(
            f"endpoint {name!r} is at an untouched base: there is nothing to replay",
            param="name",
            code="nothing_to_replay",
        )
    needed = _needed(services, base, again)
    request = {
        **body.model_dump(include={"base", "onto", "activate", "message"}),
        "endpoint": name,
        "version": source.id,
        "guards": guard_request(services, base, body.guards, rows),
        "files": named.ids,
    }

    def submit(connection: Connection) -> Job:
        named.rows(connection, caller)
        if _check_onto(connection, caller, base, body.onto) is None:
            state = (Target(VersionManifest(base.ref).id),)
            endpoints.create_endpoint(
                connection,
                caller.tenant,
                body.onto,
                state,
                actor=caller.actor,
                message=body.message,
            )
        return jobs.submit_job(
            connection,
            caller.tenant,
            "replay",
            base=base.name,
            request=request,
            actor=caller.actor,
            endpoint=body.onto,
            after=prepare_missing(connection, services, caller, base, needed),
        )

    return submit


def check_diff(services: Services, caller: Caller, version_id: str, body: DiffFile) -> Submit:
    """Raises ErrataError, which names what is wrong; nothing is left behind."""
    with services.database.read() as connection:
        version = versions.get_kept_version(connection, caller.tenant, version_id)
        against = other_version(connection, caller, body.against)
        file = _file(connection, caller, body.file)
    for one in (version, against):
        base_of(services.bases, one.id, one.manifest.base)
    if file.purpose not in COMPARED:
        raise UnprocessableRequest(
            f"file: {body.file!r} was uploaded for {file.purpose!r}; versions are compared on"
            f" {', '.join(COMPARED)}",
            param="file",
        )
    base = base_of(services.bases, version.id, version.manifest.base)
    request = {
        "against": against.id,
        "purpose": file.purpose,
        "rows": file.rows,
        "files": [body.file],
    }

    def submit(connection: Connection) -> Job:
        _file(connection, caller, body.file)
        return _submitted(connection, caller, "diff", base, version, None, request)

    return submit


def other_version(connection: Connection, caller: Caller, against: str) -> Version:
    """The version that another is compared with. Raises as ``get_kept_version``."""
    try:
        return versions.get_kept_version(connection, caller.tenant, against)
    except NotFound as error:
        raise NotFound(error.message, param="against", code=error.code) from None


def _file(connection: Connection, caller: Caller, file_id: str) -> File:
    try:
        return files.get_file(connection, caller.tenant, file_id)
    except NotFound as error:
        raise NotFound(f"file: {error.message}", param="file", code=error.code) from None


def _version(
    connection: Connection, caller: Caller, version_id: str, endpoint: str | None
) -> Version:
    """The version that is worked on, at which the endpoint, where one is named, must be."""
    version = versions.get_ready_version(connection, caller.tenant, version_id)
    if endpoint is None:
        return version
    head = head_of(connection, caller, endpoint, "endpoint")
    if head.id != version.id:
        raise Conflict(
            f"endpoint {endpoint!r} is at version {head.id}; work on that one, or name no endpoint",
            param="endpoint",
            code="endpoint_moved",
        )
    return version


def _submitted(
    connection: Connection,
    caller: Caller,
    kind: str,
    base: Base,
    version: Version,
    endpoint: str | None,
    request: Mapping[str, Any],
    after: str | None = None,
) -> Job:
    """The job on a version or, where one is named, on the endpoint that is at it."""
    return jobs.submit_job(
        connection,
        caller.tenant,
        kind,
        base=base.name,
        request=request,
        actor=caller.actor,
        endpoint=endpoint,
        parent=version.id if endpoint is None else None,
        after=after,
    )


def _check_open(services: Services, stack: Iterable[str]) -> None:
    """Refuse a stack with work after a gate that replaces a module's output, on that module."""
    closed: dict[str, str] = {}
    for digest in stack:
        for touched in read_contents(services.artifacts, digest).modules:
            if touched.module in closed:
                raise UnprocessableRequest(
                    f"delta {closed[touched.module]} replaces what {touched.module} puts out, and"
                    f" delta {digest} goes on after it: they cannot be one delta; revert one of"
                    " them first",
                    code="replacing_gate",
                )
            if touched.replaces:
                closed[touched.module] = digest


def _check_onto(connection: Connection, caller: Caller, base: Base, onto: str) -> Version | None:
    """The head of the endpoint that a replay builds on; None where it is still to be made."""
    try:
        endpoints.get_endpoint(connection, caller.tenant, onto)
    except NotFound:
        check_unreserved(onto, "onto")
        return None
    head = head_of(connection, caller, onto, "onto")
    if head.manifest.base != base.ref:
        raise UnprocessableRequest(
            f"onto: endpoint {onto!r} is at a version of base {head.manifest.base.name!r}; name one"
            f" on base {base.name!r}, or a new one",
            param="onto",
        )
    return versions.get_ready_version(connection, caller.tenant, head.id)


def _needed(services: Services, base: Base, again: Sequence[Version]) -> frozenset[str]:
    """The resources of a base that recipes need to run there.

    Raises:
        UnprocessableRequest: one cannot run there; names its version.
    """
    needed = {TEXTS}
    for version in again:
        recipe = version.manifest.recipe
        try:
            if recipe["kind"] == "edit":
                needed |= _needed_by_edit(services, base, recipe)
            else:
                entry = find_tuning(recipe["method"])
                rows = read_rows(services, recipe["rows"])
                check_rows("rows", rows, entry.rows, base, recipe["options"].get("reward"))
        except (UnprocessableRequest, NotFound) as error:
            raise _not_replayable(version, base, error.message, error.param) from error
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            why = f"its recipe, which came from elsewhere, cannot be read ({error!r:.200})"
            raise _not_replayable(version, base, why, None) from error
    return frozenset(needed)


def _not_replayable(
    version: Version, base: Base, why: str, param: str | None
) -> UnprocessableRequest:
    return UnprocessableRequest(
        f"version {version.id} cannot be made anew on base {base.name!r}: {why};"
        " take it out first (POST /v1/versions/{id}/revert)",
        param=param,
        code="not_replayable",
    )


def _needed_by_edit(services: Services, base: Base, recipe: Mapping[str, Any]) -> frozenset[str]:
    entry = find_method(recipe["method"])
    resources = check_edit(base, entry.name, recipe["hyperparameters"]).resources
    check_edits(
        entry, base, [EditRequest.from_json(row) for row in services.edits(recipe["edits"])]
    )
    return resources
