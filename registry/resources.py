"""What jobs need of a base, kept once per base and source: texts, prefixes, C by layer; and for a
while the rows that preprocessing made."""

from __future__ import annotations

import time

from sqlalchemy import Connection, delete, func, insert, select, update

from registry import tables
from registry.jobs import ENDED

#: What the sources begin with of what any job can make anew.
PREPROCESSING = "preprocessing/"


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


def use_resources(connection: Connection, base_digest: str, source: str) -> dict[str, str]:
    """As ``find_resources``; they count as made now, so that they stay until the job has ended."""
    table = tables.resources
    connection.execute(
        update(table)
        .where(table.c.base_digest == base_digest, table.c.source == source)
        .values(created_at=time.time())
    )
    return find_resources(connection, base_digest, source)


def forget_preprocessed(connection: Connection, grace: float) -> None:
    """Let go of rows that preprocessing made, once no job needs them: versions name their own.

    What a job that has not ended uses was used since it was posted. Machines' clocks differ by less
    than ``grace`` seconds.
    """
    table, jobs = tables.resources, tables.jobs
    unfinished = select(func.min(jobs.c.created_at)).where(jobs.c.status.not_in(ENDED))
    oldest = connection.execute(unfinished).scalar_one()
    now = time.time()
    before = (now if oldest is None else min(now, oldest)) - grace
    connection.execute(
        delete(table).where(table.c.source.startswith(PREPROCESSING), table.c.created_at < before)
    )
