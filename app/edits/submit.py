"""From an edit request to its job: everything that can be wrong is said before the job exists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection

from app.edits.schemas import CreateEdit
from app.services import Caller, Services
from app.submission import (
    NamedFiles,
    Submit,
    guard_files,
    guard_request,
    head_of,
    named_by,
    prepare_missing,
    read_edit_rows,
    read_rows,
)
from registry import jobs, versions
from registry.bases import base_of
from registry.edits import edited
from registry.errors import UnprocessableRequest
from registry.history import check_depth
from registry.jobs import Job
from registry.manifests import EditRequest, Example, canonical_json
from registry.versions import Version
from workers.inputs import check_edits, check_examples, check_texts, read_examples
from workers.recipes import check_edit, find_method

LISTED_WARNINGS = 100


def check_request(services: Services, caller: Caller, body: CreateEdit) -> Submit:
    """Check a request and store its edits and examples; what is returned submits the job.

    Raises:
        ErrataError: names the field that is wrong; nothing is left behind.
    """
    entry = find_method(body.method)
    for name in ("batch_size", "check_every"):
        if entry.replaces and getattr(body, name) is not None:
            raise UnprocessableRequest(
                f"method {entry.name!r} replaces what a layer says, so that its batches do not make"
                f" one delta; leave {name} out",
                param=name,
            )
    named = NamedFiles(
        {
            "file": (body.file, "edits"),
            "examples_file": (body.examples_file, "examples"),
            "texts": (body.texts, "texts"),
            **guard_files(body.guards),
        }
    )
    with services.database.read() as connection:
        parent = _parent(connection, caller, body)
        chain = versions.lineage(connection, caller.tenant, parent.id)
        rows = named.rows(connection, caller)
    check_depth(parent, services.settings.max_stack, "endpoint" if body.endpoint else "parent")
    base = base_of(services.bases, parent.id, parent.manifest.base)
    recipe = check_edit(base, entry.name, body.hyperparameters)
    edits = read_edit_rows(services, body.edits, rows.get("file"))
    examples = _examples(services, body, rows.get("examples_file"))
    check_edits(entry, base, edits)
    check_examples(entry, examples)
    check_texts(entry, body.texts)
    put = services.artifacts.put
    request: dict[str, Any] = {
        **body.model_dump(include={"endpoint", "parent", "activate", "on_conflict", "message"}),
        **body.model_dump(include={"batch_size", "check_every"}),
        "method": entry.name,
        "edits": put(canonical_json([e.to_json() for e in edits])) if edits else None,
        "edit_count": len(edits),
        "examples": put(canonical_json([e.to_json() for e in examples])) if examples else None,
        "texts": rows.get("texts"),
        "hyperparameters": recipe.hyperparameters.model_dump(mode="json"),
        "guards": guard_request(services, base, body.guards, rows),
        "files": named.ids,
        "warnings": _warnings(services, chain, edits),
    }

    def submit(connection: Connection) -> Job:
        named.rows(connection, caller)
        return jobs.submit_job(
            connection,
            caller.tenant,
            "edit",
            base=base.name,
            request=request,
            actor=caller.actor,
            endpoint=body.endpoint,
            parent=body.parent,
            after=prepare_missing(connection, services, caller, base, recipe.resources),
        )

    return submit


def _parent(connection: Connection, caller: Caller, body: CreateEdit) -> Version:
    if body.endpoint is None:
        with named_by("parent"):
            return versions.get_ready_version(connection, caller.tenant, body.parent or "")
    head = head_of(connection, caller, body.endpoint, "endpoint")
    return versions.get_ready_version(connection, caller.tenant, head.id)


def _examples(services: Services, body: CreateEdit, file: str | None) -> list[Example]:
    return read_examples((body.examples or []) if file is None else read_rows(services, file))


def _warnings(
    services: Services, chain: Sequence[Version], edits: Sequence[EditRequest]
) -> list[str]:
    """What the request does again: edits of subjects that the parent's stack edits already."""
    wanted: dict[str, list[int]] = {}
    for i, edit in enumerate(edits):
        if edit.subject:
            wanted.setdefault(edit.subject.strip(), []).append(i)
    found = [
        f"edits.{i}: version {version.id} edits {edit['subject']!r} already"
        f" ({edit['prompt']!r} -> {edit.get('target_new') or edit.get('redirect_to')!r},"
        f" edit {version.id}.{place})"
        for version, _ in edited(chain)
        for place, edit in enumerate(services.edits(version.manifest.recipe["edits"]))
        for i in wanted.get(edit.get("subject", "").strip(), ())
    ]
    more = len(found) - LISTED_WARNINGS
    return found[:LISTED_WARNINGS] + ([f"and {more} more of the kind"] if more > 0 else [])
