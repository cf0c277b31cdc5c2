"""What posting work has in common: the job taken once, what it needs prepared, its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Concatenate, ParamSpec

from fastapi import Depends, Header, Request, Response
from pydantic import BaseModel
from sqlalchemy import Connection

from app.edits.schemas import Guards
from app.jobs.schemas import JobBody, job_body
from app.services import Caller, CallerDep, Services, ServicesDep
from registry import endpoints, failpoints, files, jobs, versions
from registry.bases import Base
from registry.errors import Conflict, Gone, NotFound, UnprocessableRequest
from registry.jobs import Job
from registry.manifests import EditRequest, HarmPrompt, Question, VersionManifest, sha256
from registry.resources import find_resources
from registry.versions import Version
from workers.inputs import check_harm, check_suite, read_edits
from workers.recipes import text_source

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        description="The same key within 24 h answers with the same job.",
    ),
]
#: Writes a job that was found right, in the transaction that it is given.
Submit = Callable[[Connection], Job]
P = ParamSpec("P")


class Submission:
    """A request for a job: who asks, of which path, and under which key."""

    def __init__(
        self,
        request: Request,
        response: Response,
        services: ServicesDep,
        caller: CallerDep,
        idempotency_key: IdempotencyKey = None,
    ) -> None:
        self.services, self.caller = services, caller
        self._path, self._response, self._key = request.url.path, response, idempotency_key

    def once(
        self,
        check: Callable[Concatenate[Services, Caller, P], Submit],
        *asked: P.args,
        **named: P.kwargs,
    ) -> JobBody:
        """Answer with the job that this key made before of the same request, or with a new one.

        Args:
            check: looks at what is asked without holding the database's lock.

        Raises:
            Conflict: the key came with another request. TooManyRequests: the queue is full.
            ErrataError: what ``check`` finds.
        """
        digest = sha256(json.dumps([self._path, asked, named], default=_as_json).encode())
        answer = self._made_before(digest)
        if answer is None:
            submit = check(self.services, self.caller, *asked, **named)
            with self.services.database.write() as connection:
                job = self._found(connection, digest)
                if job is None:
                    check_room(connection, self.services, self.caller)
                    job = submit(connection)
                    if self._key is not None:
                        jobs.remember_idempotent(
                            connection, self.caller.tenant, self._key, digest, job.id
                        )
                answer = job_body(connection, job)
                failpoints.reach("submit-commit")
            failpoints.reach("submit-committed")
        self._response.headers["Location"] = f"/v1/jobs/{answer.id}"
        return answer

    def _made_before(self, digest: str) -> JobBody | None:
        if self._key is None:
            return None
        with self.services.database.read() as connection:
            job = self._found(connection, digest)
            return None if job is None else job_body(connection, job)

    def _found(self, connection: Connection, digest: str) -> Job | None:
        if self._key is None:
            return None
        return jobs.find_idempotent(connection, self.caller.tenant, self._key, digest)


SubmissionDep = Annotated[Submission, Depends()]


def check_room(connection: Connection, services: Services, caller: Caller) -> None:
    """Look whether the caller may submit one more job. Raises TooManyRequests."""
    settings = services.settings
    jobs.check_room(connection, caller.tenant, settings.max_tenant_jobs, settings.max_jobs)


def _as_json(asked: BaseModel) -> Any:
    return asked.model_dump(mode="json")


def prepare_missing(
    connection: Connection, services: Services, caller: Caller, base: Base, names: frozenset[str]
) -> str | None:
    """The id of the job that makes what is missing of ``names``: one of the caller's that is under
    way, or a new one. Where two tenants' jobs make the same, what the first has made stays."""
    source, _ = text_source(services.settings, base)
    missing = set(names - set(find_resources(connection, base.digest, source)))
    if not missing:
        return None
    tenant = caller.tenant
    job = jobs.unfinished_like(connection, tenant, "prepare", base.name, missing)
    job = job or jobs.submit_job(
        connection,
        tenant,
        "prepare",
        base=base.name,
        request={"resources": sorted(missing)},
        actor=caller.actor,
    )
    return job.id


def head_of(connection: Connection, caller: Caller, name: str, param: str) -> Version:
    """The version that an endpoint is all at.

    Raises:
        NotFound; UnprocessableRequest: the endpoint is split. ``param`` is the field that named it.
    """
    try:
        endpoint = endpoints.get_endpoint(connection, caller.tenant, name)
        return versions.get_version(connection, caller.tenant, endpoint.head)
    except NotFound as error:
        raise NotFound(error.message, param=param, code=error.code) from None
    except Conflict as error:
        raise UnprocessableRequest(error.message, param=param, code=error.code) from None


def check_unreserved(name: str, param: str) -> None:
    """Refuse a new endpoint's name that is taken for others. Raises UnprocessableRequest."""
    if name.startswith(("ver_", "base_")):
        raise UnprocessableRequest(
            f"{name!r}: names that begin with ver_ or base_ are reserved", param=param
        )


@contextmanager
def named_by(param: str) -> Iterator[None]:
    """What is wrong with that which a field names is told of the field."""
    try:
        yield
    except (NotFound, Gone, Conflict) as error:
        raise type(error)(error.message, param=param, code=error.code) from None


def named_version(
    connection: Connection, services: Services, caller: Caller, model: str, *, ready: bool = False
) -> Version:
    """The version that ``model`` names: an endpoint's head, a version, or a base's own.

    Args:
        ready: refuse one that a guard rejected.

    Raises:
        NotFound, Gone, Conflict, UnprocessableRequest: the field that named it is ``model``.
    """
    get = versions.get_ready_version if ready else versions.get_kept_version
    with named_by("model"):
        if model.startswith("ver_"):
            return get(connection, caller.tenant, model)
        if not model.startswith("base_"):
            return head_of(connection, caller, model, "model")
    base = services.bases.get(model.removeprefix("base_"))
    if base is None:
        raise NotFound(
            f"model {model!r} does not exist; GET /v1/models lists endpoints and bases",
            param="model",
            code="model_not_found",
        )
    return versions.get_version(connection, caller.tenant, VersionManifest(base.ref).id)


class NamedFiles:
    """The files that a request names, by the field that names each."""

    def __init__(self, named: Mapping[str, tuple[str | None, str]]) -> None:
        """``named``: by field, the file's id if one is given, and the purpose it must have."""
        self._named = {field: (id_, use) for field, (id_, use) in named.items() if id_ is not None}

    @property
    def ids(self) -> list[str]:
        return sorted({file_id for file_id, _ in self._named.values()})

    def rows(self, connection: Connection, caller: Caller) -> dict[str, str]:
        """By field, the digest of what the file was read as.

        Raises:
            NotFound, UnprocessableRequest: there is no such file, or it has another purpose.
        """
        found = {}
        for field, (file_id, purpose) in self._named.items():
            try:
                file = files.get_file(connection, caller.tenant, file_id)
            except NotFound as error:
                raise NotFound(f"{field}: {error.message}", param=field, code=error.code) from None
            if file.purpose != purpose:
                raise UnprocessableRequest(
                    f"{field}: file {file_id!r} was uploaded for {file.purpose!r}; upload it with"
                    f" purpose {purpose!r}",
                    param=field,
                )
            found[field] = file.rows
        return found


#: The fields of a request's guards that name files, each of the purpose of its name.
GUARD_FILES = ("texts", "facts", "suite", "harm")


def guard_files(guards: Guards) -> dict[str, tuple[str | None, str]]:
    """The files that guards name, as ``NamedFiles`` takes them."""
    return {f"guards.{name}": (getattr(guards, name), name) for name in GUARD_FILES}


def guard_request(
    services: Services, base: Base, guards: Guards, rows: Mapping[str, str]
) -> dict[str, Any]:
    """What a job is told of its guards.

    Args:
        rows: by field, the digest of what a file was read as.

    Raises:
        UnprocessableRequest: prompts or questions that the base cannot be asked.
    """
    check_harm_file(services, base, "guards.harm", rows)
    check_suite_file(services, base, "guards.suite", rows)
    return guards.model_dump() | {name: rows.get(f"guards.{name}") for name in GUARD_FILES}


def check_harm_file(services: Services, base: Base, field: str, rows: Mapping[str, str]) -> None:
    """Refuse a file of requests that the base cannot be asked; fine where there is none.

    Raises:
        UnprocessableRequest
    """
    if field in rows:
        check_harm(field, base, [HarmPrompt(**row) for row in read_rows(services, rows[field])])


def check_suite_file(services: Services, base: Base, field: str, rows: Mapping[str, str]) -> None:
    """Refuse a file of questions that the base cannot be asked; fine where there is none.

    Raises:
        UnprocessableRequest
    """
    if field in rows:
        questions = [Question.from_json(row) for row in read_rows(services, rows[field])]
        check_suite(field, base, questions)


def read_rows(services: Services, digest: str) -> Sequence[Any]:
    """The rows that a file was read as."""
    return services.artifacts.rows(digest)


def read_edit_rows(
    services: Services, inline: list[dict[str, Any]] | None, file: str | None
) -> list[EditRequest]:
    """The edits of a request's body or, where it names one, of a file.

    Raises:
        UnprocessableRequest: there are too many, or one is wrong.
    """
    field = "edits" if file is None else "file"
    rows: Sequence[Any] = (inline or []) if file is None else read_rows(services, file)
    limit = services.settings.max_edits
    if len(rows) > limit:
        raise UnprocessableRequest(
            f"{field} holds {len(rows)} edits; the limit is {limit} (ERRATA_MAX_EDITS)",
            param=field,
        )
    return read_edits(rows)
