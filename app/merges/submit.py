"""From a merge request to its job: everything that can be wrong is said before the job exists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection

from app.merges.schemas import CreateMerge
from app.services import Caller, Services
from app.submission import NamedFiles, Submit, guard_files, guard_request, head_of, prepare_missing
from registry import jobs, versions
from registry.bases import Base, base_of
from registry.errors import Conflict, Gone, NotFound, UnprocessableRequest
from registry.jobs import Job
from registry.versions import Version
from workers.inputs import check_mergeable
from workers.recipes import TEXTS, check_merge, find_merge


def check_request(services: Services, caller: Caller, body: CreateMerge) -> Submit:
    """Check a request; what is returned submits the job.

    Raises:
        ErrataError: names the field that is wrong; nothing is left behind.
    """
    return _checked(services, caller, body, "merge", body.endpoint, frozenset({TEXTS}))


def check_preview(services: Services, caller: Caller, body: CreateMerge) -> Submit:
    """As ``check_request``, for a report alone: it waits for no endpoint."""
    return _checked(services, caller, body, "merge_preview", None, frozenset())


def _checked(
    services: Services,
    caller: Caller,
    body: CreateMerge,
    kind: str,
    endpoint: str | None,
    resources: frozenset[str],
) -> Submit:
    entry = find_merge(body.method)
    weights = [{None: own.weight, **own.layer_weights} for own in body.versions]
    hyperparameters = check_merge(entry, body.hyperparameters, weights)
    facts = {
        f"versions.{place}.facts": (own.facts, "facts") for place, own in enumerate(body.versions)
    }
    named = NamedFiles({**facts, **guard_files(body.guards)})
    with services.database.read() as connection:
        merged = _versions(connection, caller, body)
        if body.endpoint is not None:
            _check_endpoint(connection, caller, body.endpoint, merged[0])
        rows = named.rows(connection, caller)
    base = base_of(services.bases, merged[0].id, merged[0].manifest.base)
    for place, (own, version) in enumerate(zip(body.versions, merged, strict=True)):
        _check_layers(base, f"versions.{place}.layer_weights", own.layer_weights)
        stack = version.manifest.stack
        check_mergeable(f"versions.{place}.id", version.id, stack, services.artifacts)
    request: dict[str, Any] = {
        **body.model_dump(include={"endpoint", "activate", "message", "seed", "rank"}),
        "versions": [
            {
                **own.model_dump(mode="json", include={"id", "weight", "layer_weights"}),
                "facts": rows.get(f"versions.{place}.facts"),
            }
            for place, own in enumerate(body.versions)
        ],
        "method": entry.name,
        "hyperparameters": hyperparameters.model_dump(mode="json"),
        "guards": guard_request(services, base, body.guards, rows),
        "files": named.ids,
        "warnings": _warnings(merged),
    }

    def submit(connection: Connection) -> Job:
        named.rows(connection, caller)
        return jobs.submit_job(
            connection,
            caller.tenant,
            kind,
            base=base.name,
            request=request,
            actor=caller.actor,
            endpoint=endpoint,
            after=prepare_missing(connection, services, caller, base, resources),
        )

    return submit


def _versions(connection: Connection, caller: Caller, body: CreateMerge) -> list[Version]:
    """The versions that are named: ready, and of one base."""
    found: list[Version] = []
    for place, own in enumerate(body.versions):
        field = f"versions.{place}.id"
        try:
            version = versions.get_ready_version(connection, caller.tenant, own.id)
        except (NotFound, Gone, Conflict) as error:
            raise UnprocessableRequest(
                f"{field}: {error.message}", param=field, code=error.code
            ) from None
        found.append(version)
        base, first = version.manifest.base, found[0].manifest.base
        if base.digest != first.digest:
            raise UnprocessableRequest(
                f"{field}: version {version.id!r} stands on base {base.name!r}"
                f" ({base.digest[:12]}…), the first one on {first.name!r} ({first.digest[:12]}…);"
                " versions of one base are merged",
                param=field,
            )
    return found


def _check_endpoint(connection: Connection, caller: Caller, name: str, version: Version) -> None:
    """Refuse an endpoint that is split, or on another base."""
    head = head_of(connection, caller, name, "endpoint")
    if head.manifest.base != version.manifest.base:
        raise UnprocessableRequest(
            f"endpoint {name!r} is on base {head.manifest.base.name!r}, the versions are on"
            f" {version.manifest.base.name!r}; name an endpoint on their base",
            param="endpoint",
        )


def _check_layers(base: Base, field: str, weights: dict[int, float]) -> None:
    for layer in weights:
        if layer >= base.depth:
            raise UnprocessableRequest(
                f"{field}.{layer} is out of range; base {base.name!r} has layers 0 to"
                f" {base.depth - 1}",
                param=f"{field}.{layer}",
            )


def _warnings(merged: Sequence[Version]) -> list[str]:
    """Deltas that several of the versions have: a sum of changes has them as many times."""
    seen: dict[str, int] = {}
    found = []
    for place, version in enumerate(merged):
        stack = set(version.manifest.stack)
        for other in sorted({seen[digest] for digest in stack & seen.keys()}):
            shared = len(stack & set(merged[other].manifest.stack))
            found.append(
                f"versions.{place} has {shared} delta(s) in common with versions.{other}; what they"
                " change counts as often as it is named"
            )
        seen |= dict.fromkeys(stack - seen.keys(), place)
    return found
