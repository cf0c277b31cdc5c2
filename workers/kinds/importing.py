"""An import: an adapter becomes a delta on its parent, an archive the version that was exported.

Either passes the guards as what any job makes does: an adapter beside its parent, an archive's
version beside the untouched base.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence

from editing.deltas import Delta, Effect, compose
from editing.deltas.fit import read_fitting
from editing.exchange.names import ADAPTER_WEIGHTS, PEFT
from editing.exchange.peft import read_adapter
from editing.guards import judge, read
from editing.metrics import greedy_matches
from editing.metrics.norm import update_ratio
from editing.models.view import ModelView
from registry.edits import edited
from registry.errors import ArtifactCorrupt, UnprocessableRequest
from registry.manifests import EditRequest, Progress, VersionManifest, canonical_json, finite
from registry.results import Result
from registry.versions import READY, Version, traced
from workers.archives import History, Upload, check_base, check_signed, open_upload
from workers.evidence import limits_of, material_of
from workers.ground import parent_of
from workers.inputs import read_edits
from workers.kinds.prepare import load_resources
from workers.recipes import TEXTS
from workers.work import Work


def perform(work: Work) -> Result:
    """Read and check the archive that the request names, and judge what it makes.

    Raises:
        UnprocessableRequest: what is wrong in it, and where.
    """
    work.report(Progress(0, 0, "reading"))
    with work.artifacts.open(work.claim.job.request["archive"]) as stream:
        upload = open_upload(stream, work.settings.max_file_bytes)
        return _adapter(work, upload) if upload.kind == PEFT else _archive(work, upload)


def _adapter(work: Work, upload: Upload) -> Result:
    job, (parent, view, stack) = work.claim.job, parent_of(work)
    effects = read_adapter(view, upload.form(), upload.archive.read(ADAPTER_WEIGHTS))
    delta = Delta(effects, view.base.digest, "import")
    below = compose(one.effects for one in stack)
    manifest = VersionManifest(
        base=parent.manifest.base,
        stack=(*parent.manifest.stack, work.artifacts.put(delta.to_bytes())),
        parents=(parent.id,),
        recipe={
            "kind": "import",
            "job": job.id,
            "format": PEFT,
            "archive": job.request["archive"],
            "label": job.request["label"],
            "author": job.actor,
        },
    )
    return _judged(work, view, manifest, below, effects)


def _archive(work: Work, upload: Upload) -> Result:
    _, view, _ = parent_of(work)
    history = upload.history()
    check_base(history, {view.base.name: view.base})
    check_signed(history, work.database.trust)
    _store(work, upload)
    stack = [_read(work, view, digest) for digest in history.head.stack]
    edits = _live_edits(work, history)
    return _judged(
        work,
        view,
        history.head,
        {},
        compose(one.effects for one in stack),
        edits,
        history,
    )


def _judged(
    work: Work,
    view: ModelView,
    manifest: VersionManifest,
    below: Mapping[str, Effect],
    effects: Mapping[str, Effect],
    edits: Mapping[str, Sequence[EditRequest]] | None = None,
    history: History | None = None,
) -> Result:
    """What the guards say of ``effects`` on top of what is below.

    Args:
        edits: the version's live edits by the version that made them.
        history: where it comes from an archive.
    """
    request = work.claim.job.request
    live = [edit for made in (edits or {}).values() for edit in made]
    references = load_resources(work, frozenset({TEXTS})).references
    material = material_of(work, view.base, live, references, request["guards"])
    work.report(Progress(0, 0, "measuring"))
    with view.with_effects(below):
        before = read(view, material)
        with view.with_effects(effects):
            after = read(view, material)
            matches = iter(greedy_matches(view, [(e.rewrite_prompt, e.target_new) for e in live]))
    limits = limits_of(work.settings, request["guards"])
    guards = judge(material, before, after, update_ratio(view, effects), limits)
    work.models.check_untouched(work.claim.job.base)
    holds = {key: [next(matches) for _ in made] for key, made in (edits or {}).items()}
    return Result(
        manifest,
        {
            "before": finite(before.metrics),
            "after": finite(after.metrics),
            "modules": len(effects),
        },
        guards,
        holds=work.artifacts.put(canonical_json(holds)) if holds else None,
        ancestors=() if history is None else history.ancestors,
        signatures=None if history is None else history.signatures,
    )


def _store(work: Work, upload: Upload) -> None:
    """Keep an archive's artifacts, once all of them have the digests that they are named by."""
    members = list(upload.artifacts())
    for digest, name in members:
        found = hashlib.sha256()
        for chunk in upload.archive.chunks(name):
            found.update(chunk)
        if found.hexdigest() != digest:
            raise _refused(f"{name} has digest {found.hexdigest()}: it is damaged; export it again")
    for place, (_, name) in enumerate(members, start=1):
        work.artifacts.put_chunks(upload.archive.chunks(name))
        work.report(Progress(place, len(members), f"artifact {place} of {len(members)}"))


def _read(work: Work, view: ModelView, digest: str) -> Delta:
    """A delta that was uploaded. Raises UnprocessableRequest: it is none of this base."""
    try:
        return read_fitting(work.artifacts.get(digest), view.model, view.base.digest)
    except ArtifactCorrupt as error:
        raise _refused(f"artifact {digest}: {error.message}") from None


def _live_edits(work: Work, history: History) -> dict[str, list[EditRequest]]:
    """The edits that the head still carries, by version, as strictly read as in a request."""
    tenant, now = work.claim.job.tenant, time.time()
    known = {one.id: Version(tenant, one, READY, None, now) for one in history.manifests}
    found = {}
    for version, _ in edited(traced(history.head.id, known.__getitem__)):
        digest = version.manifest.recipe.get("edits")
        if not isinstance(digest, str) or not work.artifacts.holds(digest):
            raise _refused(f"it lacks the edits of version {version.id}; export the version again")
        try:
            rows = json.loads(work.artifacts.get(digest))
            found[version.id] = read_edits(rows)
            is_own = [edit.to_json() for edit in found[version.id]] == rows
        except (ValueError, TypeError, RecursionError):
            is_own = False
        if not is_own:
            raise _refused(f"the edits of version {version.id} are not as this service writes them")
    return found


def _refused(why: str) -> UnprocessableRequest:
    return UnprocessableRequest(f"file: {why}", param="file", code="archive_refused")
