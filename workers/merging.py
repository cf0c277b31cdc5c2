"""The versions that a merge job names: their deltas on disk, their live edits, their facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from editing.deltas import DeltaFile
from editing.deltas.fit import check_file
from editing.merging.changes import Input
from editing.models.view import ModelView
from registry.edits import edited
from registry.errors import JobFailed
from registry.manifests import EditRequest, Fact
from registry.versions import Version, get_ready_version, lineage
from workers.ground import read_edits
from workers.work import Work

#: An edit: the version that made it, and its place there.
Origin = tuple[str, int]


@dataclass(frozen=True)
class Parent:
    """One of the versions that are merged.

    Attributes:
        edits: its live edits by origin, newest first.
        facts: what the request asks of it, beside them.
    """

    version: Version
    input: Input
    edits: Mapping[Origin, EditRequest]
    facts: tuple[Fact, ...] = ()


def parents_of(work: Work) -> tuple[ModelView, list[Parent]]:
    """The view of a claimed job's base, and the versions that its request names.

    Raises:
        NotFound, Gone, Conflict: a version may no longer serve.
        JobFailed: a version, or the endpoint, stands on another base than this worker has.
        ArtifactCorrupt: a delta is damaged, or not of this base.
    """
    job = work.claim.job
    view = work.models.view(job.base)
    parents = [_parent(work, own) for own in job.request["versions"]]
    head = work.claim.parent
    for version in (*(parent.version for parent in parents), *(() if head is None else (head,))):
        if version.manifest.base.digest != view.base.digest:
            raise JobFailed(
                f"version {version.id} stands on base {version.manifest.base.digest[:12]}…, this"
                f" worker has {view.base.digest[:12]}… under the name {job.base!r}",
                code="base_not_loaded",
            )
    for parent in parents:
        for file in parent.input.stack:
            check_file(file, view.model, view.base.digest)
    return view, parents


def _parent(work: Work, own: Mapping[str, Any]) -> Parent:
    tenant, store = work.claim.job.tenant, work.artifacts
    with work.database.read() as connection:
        version = get_ready_version(connection, tenant, own["id"])
        chain = lineage(connection, tenant, version.id)
    edits = {
        (maker.id, place): edit
        for maker, _ in edited(chain)
        for place, edit in enumerate(read_edits(work, maker.manifest.recipe["edits"]))
    }
    stack = [DeltaFile(store.file(digest)) for digest in version.manifest.stack]
    layers = {int(layer): weight for layer, weight in own["layer_weights"].items()}
    facts = () if own["facts"] is None else store.rows(own["facts"])
    return Parent(
        version,
        Input(version.id, stack, own["weight"], layers),
        edits,
        tuple(Fact(**row) for row in facts),
    )
