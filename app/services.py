"""What the routes use, built once at start, and who is asking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from registry.artifacts import ArtifactStore
from registry.bases import Base
from registry.database import Database
from registry.settings import Settings
from serving.client import EngineClient
from workers.dispatch import Dispatcher

DEFAULT_TENANT = "default"


@dataclass(frozen=True)
class Services:
    """The parts of a running service."""

    settings: Settings
    bases: Mapping[str, Base]
    database: Database
    artifacts: ArtifactStore
    engine: EngineClient
    dispatcher: Dispatcher


@dataclass(frozen=True)
class Caller:
    """Who asks: the tenant that everything is scoped by, and the name that histories show."""

    tenant: str
    actor: str


def get_services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


def get_caller() -> Caller:
    """On loopback no key is asked for: everyone is the default tenant's owner."""
    return Caller(DEFAULT_TENANT, "local")


ServicesDep = Annotated[Services, Depends(get_services)]
CallerDep = Annotated[Caller, Depends(get_caller)]
