"""From a fine-tuning request to its job: what can be wrong is said before the job exists."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from app.fine_tuning.schemas import CreateFineTuning, Method
from app.services import Caller, Services
from app.submission import (
    NamedFiles,
    Submit,
    guard_files,
    guard_request,
    named_version,
    prepare_missing,
    read_rows,
)
from registry import jobs
from registry.bases import base_of
from registry.errors import UnprocessableRequest
from registry.history import check_depth
from registry.jobs import Job
from workers.preprocessing import check_forms, rows_made
from workers.recipes import TEXTS, check_options, check_rows, check_tuning, find_tuning


def check_request(services: Services, caller: Caller, body: CreateFineTuning) -> Submit:
    """Check a request; what is returned submits the job.

    Raises:
        ErrataError: names the field that is wrong; nothing is left behind.
    """
    entry = find_tuning((body.method or Method()).type)
    hyperparameters, given = _parameters(body, entry.name)
    options = check_options(entry, given)
    harmful = f"method.{entry.name}.booster.harmful_file"
    named = NamedFiles(
        {
            "training_file": (body.training_file, "fine-tune"),
            "validation_file": (body.validation_file, "fine-tune"),
            harmful: (options.get("booster", {}).get("harmful_file"), "fine-tune"),
            **guard_files(body.guards),
        }
    )
    with services.database.read() as connection:
        parent = named_version(connection, services, caller, body.model, ready=True)
        rows = named.rows(connection, caller)
    check_depth(parent, services.settings.max_stack, "model")
    base = base_of(services.bases, parent.id, parent.manifest.base)
    examples = read_rows(services, rows["training_file"])
    settled = check_tuning(entry, hyperparameters, rows_made(body.preprocessing, len(examples)))
    for field in ("training_file", "validation_file", harmful):
        if field in rows:
            found = read_rows(services, rows[field])
            check_forms(() if field == harmful else body.preprocessing, found, field, base)
            check_rows(field, found, entry.rows, base, options.get("reward"))
    request: dict[str, Any] = {
        **body.model_dump(
            include={"model", "training_file", "validation_file", "suffix", "metadata", "message"}
        ),
        "preprocessing": [step.model_dump(mode="json") for step in body.preprocessing],
        "method": entry.name,
        "hyperparameters": settled.model_dump(mode="json"),
        "options": options,
        "seed": body.seed or 0,
        "rows": rows["training_file"],
        "row_count": len(examples),
        "validation": rows.get("validation_file"),
        "harmful": rows.get(harmful),
        "guards": guard_request(services, base, body.guards, rows),
        "files": named.ids,
    }

    def submit(connection: Connection) -> Job:
        named.rows(connection, caller)
        return jobs.submit_job(
            connection,
            caller.tenant,
            "fine_tune",
            base=base.name,
            request=request,
            actor=caller.actor,
            parent=parent.id,
            after=prepare_missing(connection, services, caller, base, frozenset({TEXTS})),
        )

    return submit


def _parameters(body: CreateFineTuning, method: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The hyperparameters that the method's own object names, else those of the request; and what
    else stands in that object.

    Raises:
        UnprocessableRequest: an object of another method, or both places name some.
    """
    given = (body.method.model_extra or {}) if body.method is not None else {}
    for name in given:
        if name != method:
            raise UnprocessableRequest(
                f"method.{name} does not go with type {method!r}; give method.{method}",
                param=f"method.{name}",
            )
    own = given.get(method)
    if own is None:
        return body.hyperparameters or {}, {}
    if not isinstance(own, dict):
        raise UnprocessableRequest(
            f'method.{method} must be an object such as {{"hyperparameters": {{}}}}',
            param=f"method.{method}",
        )
    found = own.get("hyperparameters") or {}
    if not isinstance(found, dict):
        raise UnprocessableRequest(
            f"method.{method}.hyperparameters must be an object",
            param=f"method.{method}.hyperparameters",
        )
    if found and body.hyperparameters:
        raise UnprocessableRequest(
            f"hyperparameters stand in the request and in method.{method}; give them once",
            param="hyperparameters",
        )
    options = {name: value for name, value in own.items() if name != "hyperparameters"}
    return found or body.hyperparameters or {}, options
