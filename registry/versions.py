"""Versions: manifests that never change, their status, and reports that only grow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from graphlib import TopologicalSorter
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from registry import audit, tables
from registry.dsse import Signature
from registry.errors import ArtifactCorrupt, Conflict, Gone, NotFound
from registry.manifests import GuardResult, VersionManifest
from registry.pages import Page, newest_first
from registry.signatures import add_signatures, check_trusted, sign

READY, REJECTED, DELETED = "ready", "rejected", "deleted"


@dataclass(frozen=True)
class Version:
    """A row of the versions table. ``manifest.id`` is the digest that names it."""

    tenant: str
    manifest: VersionManifest
    status: str
    job_id: str | None
    created_at: float

    @property
    def id(self) -> str:
        return self.manifest.id


def insert_version(
    connection: Connection,
    tenant: str,
    manifest: VersionManifest,
    *,
    status: str = READY,
    job_id: str | None = None,
    signatures: Iterable[Signature] | None = None,
) -> Version:
    """Add a version. Adding one that is there adds its signatures alone.

    Args:
        signatures: those that it came with; one that came with none, not even an empty list, was
            made here and is signed by this process's key, if it has one.
    """
    found = _row(connection, tenant, manifest.id)
    if found is None:
        version = _insert(connection, Version(tenant, manifest, status, job_id, time.time()))
    else:
        version = _version(found)
    if signatures is None:
        sign(connection, tenant, manifest)
    else:
        add_signatures(connection, tenant, manifest, signatures)
    return version


def _insert(connection: Connection, version: Version) -> Version:
    manifest = version.manifest
    connection.execute(
        insert(tables.versions).values(
            tenant=version.tenant,
            id=manifest.id,
            base=manifest.base.name,
            base_digest=manifest.base.digest,
            manifest=manifest.to_json(),
            status=version.status,
            job_id=version.job_id,
            created_at=version.created_at,
        )
    )
    return version


def get_version(connection: Connection, tenant: str, version_id: str) -> Version:
    """The version of that id, whatever its status.

    Raises:
        NotFound: the tenant has no such version.
        ArtifactCorrupt: the manifest that stands there is not the one that the id is the digest of.
    """
    row = _row(connection, tenant, version_id)
    if row is None:
        raise NotFound(
            f"version {version_id!r} does not exist; GET /v1/versions lists those that do",
            code="version_not_found",
        )
    version = _version(row)
    if version.id != version_id:
        raise ArtifactCorrupt(
            f"version {version_id!r}: the manifest in the database is that of {version.id};"
            " restore the database from a backup"
        )
    return version


def get_kept_version(connection: Connection, tenant: str, version_id: str) -> Version:
    """The version of that id, if it can be loaded, whatever the guards said of it.

    Raises:
        NotFound, Gone (deleted), Untrusted (no signature that is asked for).
    """
    version = get_version(connection, tenant, version_id)
    if version.status == DELETED:
        raise Gone(f"version {version_id!r} was deleted", code="version_deleted")
    check_trusted(connection, tenant, version.manifest)
    return version


def get_ready_version(connection: Connection, tenant: str, version_id: str) -> Version:
    """The version of that id, if it may serve.

    Raises:
        NotFound, Gone (deleted), Conflict (rejected by a guard), Untrusted.
    """
    version = get_kept_version(connection, tenant, version_id)
    if version.status == REJECTED:
        found = rejections(connection, tenant, version_id)
        why = "; ".join(f"guard {guard.name!r}: {describe(guard)}" for guard in found)
        raise Conflict(
            f"version {version_id!r} was rejected ({why or 'see its reports'}); nothing may point"
            ' at it, unless an admin says so by "force": true in PUT /v1/endpoints/{name}',
            code="version_rejected",
        )
    return version


def rejections(connection: Connection, tenant: str, version_id: str) -> list[GuardResult]:
    """The guards that a version failed, in the order of its reports."""
    return [
        GuardResult(**guard)
        for report in reports(connection, tenant, version_id)
        for guard in report.get("guards") or ()
        if guard["result"] == "failed"
    ]


def describe(guard: GuardResult) -> str:
    """A failed guard's figures for people: its value, the limit, and what it was before."""
    value = "not a finite number" if guard.value is None else f"{guard.value:.4g}"
    before = "" if guard.before is None else f"; before the job it was {guard.before:.4g}"
    return f"{value}, its limit is {guard.limit:g}{before}"


def override_rejection(
    connection: Connection, tenant: str, version_id: str, *, actor: str, message: str | None
) -> Version:
    """Make a rejected version ready and record who did so and why; others stay as they are."""
    version = get_version(connection, tenant, version_id)
    if version.status != REJECTED:
        return version
    failed = [asdict(guard) for guard in rejections(connection, tenant, version_id)]
    add_report(
        connection,
        tenant,
        version_id,
        None,
        {"kind": "override", "actor": actor, "message": message, "overridden": failed},
    )
    _audit(connection, version, "override", READY, actor)
    return set_status(connection, version, READY)


def _audit(connection: Connection, version: Version, action: str, status: str, actor: str) -> None:
    audit.record(
        connection,
        version.tenant,
        actor=actor,
        action=f"version.{action}",
        object=version.id,
        before={"status": version.status},
        after={"status": status},
    )


def list_versions(
    connection: Connection,
    tenant: str,
    *,
    base: str | None = None,
    status: str | None = None,
    after: str | None = None,
    limit: int = 20,
) -> Page[Version]:
    """Newest first."""
    table = tables.versions
    query = select(table).where(table.c.tenant == tenant)
    if base is not None:
        query = query.where(table.c.base == base)
    if status is not None:
        query = query.where(table.c.status == status)
    before: int | None = None
    if after is not None:
        row = _row(connection, tenant, after)
        if row is None:
            raise NotFound(f"after: version {after!r} does not exist", param="after")
        before = row.seq
    return newest_first(connection, query, table.c.seq, _version, before=before, limit=limit)


def list_changed(connection: Connection, tenant: str) -> list[Version]:
    """The versions that are there and change their base, oldest first. Raises ArtifactCorrupt."""
    table = tables.versions
    query = select(table.c.id).where(table.c.tenant == tenant, table.c.status != DELETED)
    ids = connection.execute(query.order_by(table.c.seq)).scalars().all()
    found = [get_version(connection, tenant, version_id) for version_id in ids]
    return [version for version in found if version.manifest.stack]


def lineage(connection: Connection, tenant: str, version_id: str) -> tuple[Version, ...]:
    """The version and all its ancestors, each once, every one before its parents.

    Raises:
        NotFound: the tenant has no such version.
    """
    return traced(version_id, lambda wanted: get_version(connection, tenant, wanted))


def traced(version_id: str, get: Callable[[str], Version]) -> tuple[Version, ...]:
    """As ``lineage``, of versions that ``get`` finds by their ids."""
    found: dict[str, Version] = {}
    wanted = [version_id]
    while wanted:
        versions = [get(wanted_id) for wanted_id in wanted]
        found |= {version.id: version for version in versions}
        parents = dict.fromkeys(parent for v in versions for parent in v.manifest.parents)
        wanted = [parent for parent in parents if parent not in found]
    return in_order(found.values())


def in_order(versions: Iterable[Version]) -> tuple[Version, ...]:
    """Versions in one order, every one before its parents."""
    by_id = {version.id: version for version in versions}
    graph = {
        version.id: [parent for parent in version.manifest.parents if parent in by_id]
        for version in by_id.values()
    }
    return tuple(by_id[i] for i in reversed([*TopologicalSorter(graph).static_order()]))


def ancestry(connection: Connection, tenant: str, version_id: str) -> tuple[Version, ...]:
    """The version and all that it came from, by every parent, each after its own parents."""
    found: dict[str, Version] = {}
    waiting = [get_version(connection, tenant, version_id)]
    while waiting:
        version = waiting[-1]
        parents = [parent for parent in version.manifest.parents if parent not in found]
        waiting += [get_version(connection, tenant, parent) for parent in parents]
        if not parents:
            found.setdefault(waiting.pop().id, version)
    return tuple(found.values())


def delete_version(connection: Connection, tenant: str, version_id: str, *, actor: str) -> Version:
    """Mark a version deleted.

    Raises:
        Conflict: an endpoint names it, or it is a base itself.
    """
    version = get_version(connection, tenant, version_id)
    endpoints = connection.execute(
        select(tables.endpoints.c.name, tables.endpoints.c.state).where(
            tables.endpoints.c.tenant == tenant, tables.endpoints.c.deleted.is_(False)
        )
    )
    for name, state in endpoints:
        if any(target["version"] == version_id for target in state):
            raise Conflict(
                f"version {version_id!r} is served by endpoint {name!r};"
                " move the endpoint first, then delete",
                code="version_in_use",
            )
    if not version.manifest.stack:
        raise Conflict(
            f"version {version_id!r} is the untouched base and cannot be deleted",
            code="version_in_use",
        )
    _audit(connection, version, "delete", DELETED, actor)
    return set_status(connection, version, DELETED)


def add_report(
    connection: Connection,
    tenant: str,
    version_id: str,
    job_id: str | None,
    body: Mapping[str, Any],
) -> None:
    """Append what a job measured of a version."""
    connection.execute(
        insert(tables.reports).values(
            tenant=tenant,
            version_id=version_id,
            job_id=job_id,
            body=dict(body),
            created_at=time.time(),
        )
    )


def reports(connection: Connection, tenant: str, version_id: str) -> Sequence[dict[str, Any]]:
    """All reports of a version, oldest first."""
    table = tables.reports
    rows = connection.execute(
        select(table.c.job_id, table.c.body, table.c.created_at)
        .where(table.c.tenant == tenant, table.c.version_id == version_id)
        .order_by(table.c.seq)
    )
    return [
        {"job": row.job_id, "created_at": int(row.created_at), **dict(row.body)} for row in rows
    ]


def set_status(connection: Connection, version: Version, status: str) -> Version:
    """The version with that status from now on."""
    connection.execute(
        update(tables.versions)
        .where(tables.versions.c.tenant == version.tenant, tables.versions.c.id == version.id)
        .values(status=status)
    )
    return replace(version, status=status)


def _row(connection: Connection, tenant: str, version_id: str) -> Row[Any] | None:
    table = tables.versions
    return connection.execute(
        select(table).where(table.c.tenant == tenant, table.c.id == version_id)
    ).one_or_none()


def _version(row: Row[Any]) -> Version:
    return Version(
        tenant=row.tenant,
        manifest=VersionManifest.from_json(row.manifest),
        status=row.status,
        job_id=row.job_id,
        created_at=row.created_at,
    )
