"""What the routes use, built once at start, and who is asking."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request
from sqlalchemy import Connection

from registry.artifacts import ArtifactStore
from registry.bases import Base
from registry.database import Database
from registry.errors import Forbidden
from registry.settings import Settings
from serving.client import EngineClient
from workers.dispatch import Dispatcher
from workers.notices import Notices

DEFAULT_TENANT = "default"
SCOPES = frozenset({"infer", "edit", "admin"})


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

    def edits(self, digest: str | None) -> list[dict[str, Any]]:
        """The edits that a recipe names, as ``EditRequest.to_json`` wrote them; none without."""
        return [] if digest is None else list(json.loads(self.artifacts.get(digest)))

    @contextmanager
    def moving(self) -> Iterator[Connection]:
        """A transaction that moves an endpoint; replicas hear of it once it is committed."""
        with self.database.write() as connection:
            yield connection
        self.notices.publish()


@dataclass(frozen=True)
class Caller:
    """Who asks: the tenant that everything is scoped by, the name that histories show, and what
    the caller may do (``infer``, ``edit``, ``admin``)."""

    tenant: str
    actor: str
    scopes: frozenset[str] = frozenset()

    def require(self, scope: str, what: str) -> None:
        """Raises Forbidden if the caller lacks a scope."""
        if scope not in self.scopes:
            raise Forbidden(f"{what} needs a key with the scope {scope!r}")


# Both are coroutines because a plain dependency costs a hop to a thread and back.
async def get_services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


async def get_caller() -> Caller:
    """On loopback no key is asked for: everyone is the default tenant's owner."""
    return Caller(DEFAULT_TENANT, "local", SCOPES)


ServicesDep = Annotated[Services, Depends(get_services)]
CallerDep = Annotated[Caller, Depends(get_caller)]
