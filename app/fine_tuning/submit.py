"""From a fine-tuning request to its job: what can be wrong is said before the job exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection

from app.fine_tuning.schemas import CreateFineTuning
from app.services import Caller, Services
from app.submission import NamedFiles, named_version, prepare_missing, read_rows
from registry import jobs
from registry.bases import base_of
from registry.errors import UnprocessableRequest
from registry.jobs import Job
from workers.recipes import TEXTS, check_tuning


def check_request(
    services: Services, caller: Caller, body: CreateFineTuning
) -> Callable[[Connection], Job]:
    """Check a request; what is returned submits the job.

    Raises:
        ErrataError: names the field that is wrong; nothing is left behind.
    """
    guards = body.guards
    named = NamedFiles(
        {
            "training_file": (body.training_file, "fine-tune"),
            "validation_file": (body.validation_file, "fine-tune"),
            "guards.texts": (guards.texts, "texts"),
            "guards.facts": (guards.facts, "facts"),
            "guards.suite": (guards.suite, "suite"),
        }
    )
    with services.database.read() as connection:
        parent = named_version(connection, services, caller, body.model, ready=True)
        rows = named.rows(connection, caller)
    base = base_of(services.bases, parent.id, parent.manifest.base)
    method = body.method.type if body.method is not None else "supervised"
    examples = read_rows(services, rows["training_file"])
    settled = check_tuning(base, method, _hyperparameters(body, method), len(examples))
    for field in ("training_file", "validation_file"):
        if field in rows:
            _check_examples(field, read_rows(services, rows[field]), base.has_chat_template)
    request: dict[str, Any] = {
        **body.model_dump(
            include={"model", "training_file", "validation_file", "suffix", "metadata", "message"}
        ),
        "method": method,
        "hyperparameters": settled.model_dump(mode="json"),
        "seed": body.seed or 0,
        "rows": rows["training_file"],
        "row_count": len(examples),
        "validation": rows.get("validation_file"),
        "guards": guards.model_dump()
        | {name: rows.get(f"guards.{name}") for name in ("texts", "facts", "suite")},
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


def _hyperparameters(body: CreateFineTuning, method: str) -> dict[str, Any]:
    """Those that the method's own object names, else those of the request.

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
        return body.hyperparameters or {}
    if not isinstance(own, dict) or set(own) - {"hyperparameters"}:
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
    return found or body.hyperparameters or {}


def _check_examples(field: str, examples: list[Any], has_template: bool) -> None:
    for place, example in enumerate(examples, start=1):
        if "chosen" in example:
            raise UnprocessableRequest(
                f"{field}: row {place} is a preference; methods of this kind learn from messages or"
                " from prompt and completion",
                param=field,
            )
        if "messages" in example and not has_template:
            raise UnprocessableRequest(
                f"{field}: row {place} is a conversation, and the base has no chat template; give"
                " prompt and completion",
                param=field,
            )
