"""What jobs make, and how it is kept: versions, reports, files, and the endpoint's move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection

from registry.dsse import Signature
from registry.endpoints import move_endpoint
from registry.errors import GuardRejected, Untrusted
from registry.files import ResultFile, add_file, result_file_id
from registry.jobs import FAILED, SUCCEEDED, Job
from registry.manifests import GuardResult, VersionManifest
from registry.moves import State, Target
from registry.versions import (
    DELETED,
    READY,
    REJECTED,
    Version,
    add_report,
    describe,
    insert_version,
    set_status,
)


@dataclass(frozen=True)
class Result:
    """What a job made: a version, or a report on its parent, or neither.

    Attributes:
        holds: digest of the artifact that says which live edits of the version still hold.
        withheld: why the endpoint is not to be moved though the version is good.
        report: what was measured of the parent, where no version was made.
        file: what is left to be downloaded.
        steps: versions that the work made on the way to this one, oldest first.
        ancestors: what the version came from elsewhere, oldest first; what is not here is known
            from then on as a deleted version is.
        signatures: by version, those that the version and its ancestors came with; None where the
            version was made here.
    """

    manifest: VersionManifest | None = None
    metrics: Mapping[str, Any] | None = None
    guards: Sequence[GuardResult] = ()
    holds: str | None = None
    withheld: str | None = None
    report: Mapping[str, Any] | None = None
    file: ResultFile | None = None
    steps: Sequence[VersionManifest] = ()
    ancestors: Sequence[VersionManifest] = ()
    signatures: Mapping[str, Sequence[Signature]] | None = None

    @property
    def rejected_by(self) -> GuardResult | None:
        """The first guard that failed."""
        return next((guard for guard in self.guards if guard.result == "failed"), None)

    @property
    def moves(self) -> bool:
        """Whether it is good to move an endpoint to."""
        return self.manifest is not None and self.rejected_by is None and self.withheld is None


def keep(
    connection: Connection, job: Job, parent: Version | None, result: Result, moved: bool
) -> tuple[str, dict[str, Any]]:
    """Write what a job made, in the transaction that ends it: the status it ends with, and the
    values of its row.

    Args:
        parent: what the job worked on.
        moved: the job's endpoint moved since it was claimed, and is left alone.
    """
    _keep_file(connection, job, result.file)
    if result.manifest is None:
        if result.report is not None and parent is not None:
            add_report(connection, job.tenant, parent.id, job.id, result.report)
        return SUCCEEDED, {"metrics": result.metrics, "message": "done"}
    rejected = result.rejected_by
    status = READY if rejected is None else REJECTED
    version = _keep_versions(connection, job, result.manifest, result, status)
    guards = [asdict(guard) for guard in result.guards]
    report = {"kind": job.kind, "metrics": result.metrics, "guards": guards}
    if result.holds is not None:
        report["holds"] = result.holds
    add_report(connection, job.tenant, version.id, job.id, report)
    told: dict[str, Any] = {"version_id": version.id, "metrics": result.metrics, "guards": guards}
    if rejected is not None:
        error = GuardRejected(
            f"guard {rejected.name!r} rejected version {version.id}: {describe(rejected)}"
        )
        return FAILED, {**told, "error": error.body(), "reason": "guard_rejected"}
    activated, reason = False, result.withheld
    if reason is None:
        activated, reason = _activate(connection, job, version, moved)
    return SUCCEEDED, {**told, "activated": activated, "reason": reason}


def _keep_versions(
    connection: Connection, job: Job, manifest: VersionManifest, result: Result, status: str
) -> Version:
    """The version of the manifest, after those that it came from."""
    brought = result.signatures or {}
    for ancestor in result.ancestors:
        signed = brought.get(ancestor.id, ())
        insert_version(connection, job.tenant, ancestor, status=DELETED, signatures=signed)
    for step in result.steps:
        made = insert_version(connection, job.tenant, step, status=status)
        add_report(connection, job.tenant, made.id, job.id, {"kind": "step", "of": manifest.id})
    version = insert_version(
        connection,
        job.tenant,
        manifest,
        status=status,
        job_id=job.id,
        signatures=None if result.signatures is None else brought.get(manifest.id, ()),
    )
    # as it was judged last; but what is ready stays so, since endpoints may name it
    return version if version.status == READY else set_status(connection, version, status)


def _keep_file(connection: Connection, job: Job, file: ResultFile | None) -> None:
    if file is None:
        return
    add_file(
        connection,
        job.tenant,
        filename=file.filename,
        purpose=file.purpose,
        size=file.size,
        content=file.content,
        rows=file.content,
        row_count=file.rows,
        file_id=result_file_id(job.id),
        actor=job.actor,
    )


def _activate(
    connection: Connection, job: Job, version: Version, moved: bool
) -> tuple[bool, str | None]:
    if job.endpoint is None or not job.request.get("activate", True):
        return False, None
    if moved or job.claimed_generation is None:
        return False, "endpoint_moved"
    state: State = (Target(version.id),)
    try:
        move_endpoint(
            connection,
            job.tenant,
            job.endpoint,
            state,
            generation=job.claimed_generation,
            kind="activate",
            actor=job.actor,
            job_id=job.id,
            message=job.request.get("message"),
        )
    except Untrusted as error:  # its worker has no key: it waits for whoever signs it
        return False, error.code
    return True, None
