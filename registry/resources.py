"""What editing needs of a base (texts, prefixes, C by layer), kept once per base and source."""

from __future__ import annotations

import time

from sqlalchemy import Connection, insert, select

from registry import tables


def find_resources(connection: Connection, base_digest: str, source: str) -> dict[str, str]:
    """Artifact digests by resource name."""
    table = tables.resources
    rows = connection.execute(
        select(table.c.name, table.c.artifact).where(
            table.c.base_digest == base_digest, table.c.source == source
        )
    )
    return {row.name: row.artifact for row in rows}


def add_resource(
    connection: Connection, base_digest: str, source: str, name: str, artifact: str
) -> None:
    """Keep a resource; one that is there already stays."""
    if name in find_resources(connection, base_digest, source):
        return
    connection.execute(
        insert(tables.resources).values(
            base_digest=base_digest,
            source=source,
            name=name,
            artifact=artifact,
            created_at=time.time(),
        )
    )
