"""What the routes use, built once at start, and who is asking."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

from fastapi import Depends, Request, params
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import Connection

from app.gate import Gate
from app.limits import Limiter
from app.metrics.meters import Meters
from app.probes import Probe
from registry import failpoints, keys
from registry.artifacts import ArtifactStore
from registry.bases import Base
from registry.bootstrap import DEFAULT_TENANT
from registry.counts import Counts, read_counts
from registry.database import Database
from registry.errors import Forbidden, Unauthorized
from registry.settings import Settings
from serving.client import EngineClient
from workers.dispatch import Dispatcher
from workers.notices import Notices


@dataclass(frozen=True)
class Services:
    """The parts of a running service."""

    settings: Settings
    bases: Mapping[str, Base]
    database: Database
    artifacts: ArtifactStore
    engine: EngineClient
    dispatcher: Dispatcher
    notices: Notices
    limiter: Limiter
    gate: Gate = field(default_factory=Gate)
    meters: Meters = field(default_factory=Meters)

    @cached_property
    def counts(self) -> Probe[Counts]:
        """What monitoring reads of SQL."""

        def read() -> Counts:
            with self.database.read() as connection:
                return read_counts(connection)

        return Probe("counts", read, keep=1.0)

    def edits(self, digest: str | None) -> list[dict[str, Any]]:
        """The edits that a recipe names, as ``EditRequest.to_json`` wrote them; none without."""
        return [] if digest is None else list(json.loads(self.artifacts.get(digest)))

    @contextmanager
    def moving(self) -> Iterator[Connection]:
        """A transaction that moves an endpoint; replicas hear of it once it is committed."""
        with self.database.write() as connection:
            yield connection
            failpoints.reach("move-commit")
        failpoints.reach("moved")
        self.notices.publish()


@dataclass(frozen=True)
class Caller:
    """Who asks: the tenant that everything is scoped by, the name that histories show, what the
    caller may do (``infer``, ``edit``, ``admin``), and the key that was shown."""

    tenant: str
    actor: str
    scopes: frozenset[str] = frozenset()
    key: keys.Key | None = None

    def require(self, scope: str, what: str) -> None:
        """Raises Forbidden if the caller lacks a scope."""
        if scope not in self.scopes:
            raise Forbidden(f"{what} needs a key with the scope {scope!r}")


# Both are coroutines because a plain dependency costs a hop to a thread and back.
async def get_services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(get_services)]
BEARER = HTTPBearer(auto_error=False, description="An API key (`errata keys create`).")
Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]


async def get_caller(request: Request, bearer: Bearer) -> Caller:
    """Whose key comes with the request: asked before its body is read, and then known."""
    if not hasattr(request.state, "caller"):
        request.state.caller = await _caller(await get_services(request), bearer)
    caller: Caller = request.state.caller
    return caller


async def _caller(services: Services, bearer: HTTPAuthorizationCredentials | None) -> Caller:
    """The caller with a key.

    Where none is needed, everyone without one is the default tenant's owner; what a client sends
    that must send something (``api_key="none"``) is no key.
    """
    token = "" if bearer is None else bearer.credentials
    if token.startswith(keys.PREFIX):
        key = await run_in_threadpool(_key, services, token)
        await services.limiter.admit(key)
        return Caller(key.tenant, key.name, key.scopes, key)
    if services.settings.needs_keys:
        raise Unauthorized(
            "this service asks for an API key; send it as Authorization: Bearer er_…"
            " (`errata keys create` makes one)"
        )
    return Caller(DEFAULT_TENANT, "local", keys.SCOPES)


def _key(services: Services, token: str) -> keys.Key:
    with services.database.read() as connection:
        return keys.authenticate(connection, token)


CallerDep = Annotated[Caller, Depends(get_caller)]


def needs(scope: str) -> params.Depends:
    """A dependency of routes whose callers must have a scope."""

    async def check(request: Request, caller: CallerDep) -> None:
        caller.require(scope, f"{request.method} {request.url.path}")

    dependency: params.Depends = Depends(check)
    return dependency
