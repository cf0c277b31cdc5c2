"""What exists before anybody asked for anything."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection

from sqlalchemy import Connection, insert, select

from registry import tables
from registry.bases import Base
from registry.database import Database
from registry.endpoints import create_endpoint, get_endpoint
from registry.errors import NotFound
from registry.manifests import VersionManifest
from registry.moves import Target, history
from registry.versions import get_version, insert_version

logger = logging.getLogger("errata.registry")
#: The tenant of those who need no key.
DEFAULT_TENANT = "default"


def bootstrap(database: Database, bases: Collection[Base]) -> None:
    """Bring the schema up; give every tenant the bases' versions and endpoints."""
    database.migrate()
    with database.write() as connection:
        known = connection.execute(select(tables.tenants.c.id)).scalars()
        for tenant in sorted({DEFAULT_TENANT, *known}):
            add_tenant(connection, tenant, bases)


def add_tenant(connection: Connection, tenant: str, bases: Collection[Base]) -> None:
    """Give each base its version and an endpoint of its name; fine where the tenant has them.

    An endpoint that was made before, moved or deleted since, is left as it is.
    """
    table = tables.tenants
    if connection.execute(select(table.c.id).where(table.c.id == tenant)).one_or_none() is None:
        connection.execute(insert(table).values(id=tenant, created_at=time.time()))
    for base in bases:
        version = insert_version(connection, tenant, VersionManifest(base.ref))
        if not history(connection, tenant, base.name, limit=1).items:
            create_endpoint(connection, tenant, base.name, (Target(version.id),), actor="errata")
            continue
        try:
            head = get_endpoint(connection, tenant, base.name).state[0].version
        except NotFound:
            continue
        if get_version(connection, tenant, head).manifest.base.digest != base.digest:
            logger.warning(
                "endpoint %r of tenant %r points at a version of base %r as it was before its files"
                " changed; it answers 503 until it is moved to %s",
                base.name,
                tenant,
                base.name,
                version.id,
            )
