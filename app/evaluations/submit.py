"""From an evaluation request to its job."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from app.evaluations.schemas import CreateEvaluation
from app.services import Caller, Services
from app.submission import (
    NamedFiles,
    Submit,
    check_harm_file,
    check_suite_file,
    named_version,
    prepare_missing,
    read_edit_rows,
)
from registry import jobs
from registry.bases import base_of
from registry.jobs import Job
from registry.manifests import canonical_json
from workers.inputs import check_measured
from workers.recipes import TEXTS


def check_request(services: Services, caller: Caller, body: CreateEvaluation) -> Submit:
    """Check a request and store its edits; what is returned submits the job.

    Raises:
        ErrataError: names the field that is wrong; nothing is left behind.
    """
    named = NamedFiles(
        {
            "file": (body.file, "edits"),
            "texts": (body.texts, "texts"),
            "facts": (body.facts, "facts"),
            "suite": (body.suite, "suite"),
            "harm": (body.harm, "harm"),
        }
    )
    with services.database.read() as connection:
        version = named_version(connection, services, caller, body.model)
        rows = named.rows(connection, caller)
    base = base_of(services.bases, version.id, version.manifest.base)
    edits = read_edit_rows(services, body.edits, rows.get("file"))
    if body.edits is not None or body.file is not None:
        check_measured(base, edits)
    check_harm_file(services, base, "harm", rows)
    check_suite_file(services, base, "suite", rows)
    stored = services.artifacts.put(canonical_json([e.to_json() for e in edits])) if edits else None
    request: dict[str, Any] = {
        "edits": stored,
        "edit_count": len(edits),
        **{name: rows.get(name) for name in ("texts", "facts", "suite", "harm")},
        "editability": None if body.editability is None else body.editability.model_dump(),
        "detect": body.detect,
        "files": named.ids,
    }
    needed = frozenset({TEXTS}) if body.detect and body.texts is None else frozenset[str]()

    def submit(connection: Connection) -> Job:
        named.rows(connection, caller)
        return jobs.submit_job(
            connection,
            caller.tenant,
            "evaluate",
            base=base.name,
            request=request,
            actor=caller.actor,
            parent=version.id,
            after=prepare_missing(connection, services, caller, base, needed),
        )

    return submit
