"""Restoring a backup into an empty registry, of the same kind of database or of another.

Artifacts come first: what nothing reaches yet does no harm. The rows come in one transaction, with
the schema that they were written under and its migrations since: after a failure there are none.
Which registry it was is not among them: the restored one is another, with a store of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from sqlalchemy import (
    JSON,
    Connection,
    MetaData,
    Table,
    exists,
    func,
    insert,
    select,
    text,
)

from registry.artifacts import ArtifactStore
from registry.backups import Backup, Backups
from registry.database import Database
from registry.errors import ArtifactCorrupt, Conflict
from registry.identity import claim_store, has_identity, identity_of
from registry.schema import knows_schema, newest_schema, schema_of, upgrade

BATCH = 500


def restore_backup(
    backups: Backups,
    backup: Backup,
    database: Database,
    artifacts: ArtifactStore,
    tell: Callable[[str], None] = lambda message: None,
    *,
    adopt: bool = False,
) -> None:
    """Fill an empty registry with a backup, after all of it was compared with its digests.

    Args:
        adopt: take the store of artifacts from the registry that it is of.

    Raises:
        Conflict: the registry holds something, the store is another's, or the backup is of a newer
            schema.
        ArtifactCorrupt: the backup is damaged.
    """
    if not knows_schema(backup.schema):
        raise Conflict(
            f"backup {backup.name} has schema {backup.schema}, this errata knows those up to"
            f" {newest_schema()}: restore it with errata {backup.errata} or a later one"
        )
    with database.read() as connection:
        _check_empty(connection, backup)
        own = identity_of(connection) if has_identity(connection) else None
    if not adopt:
        _check_owner(artifacts, own)
    tell("checking the backup")
    backups.verify(backup)
    digests = backups.artifacts(backup)
    with backups.whole(backup):
        for place, digest in enumerate(digests, start=1):
            tell(f"artifact {place} of {len(digests)}")
            artifacts.copy(backups.store, digest)
    with database.write() as connection:
        _check_empty(connection, backup)
        upgrade(connection, backup.schema)
        known = MetaData()
        known.reflect(connection, only=list(backup.tables))
        for name in backup.tables:
            tell(name)
            _fill(connection, known.tables[name], backups, backup)
        upgrade(connection)
    claim_store(database, artifacts, adopt=adopt)


def _check_owner(artifacts: ArtifactStore, own: str | None) -> None:
    """Raises Conflict: the store is another registry's."""
    owner = artifacts.owner()
    if owner not in (None, own):
        raise Conflict(
            f"the artifacts in {artifacts} are those of registry {owner}, and what is restored is"
            " another registry. Let ERRATA_ARTIFACTS name a prefix or a folder that is nobody's; if"
            " that registry is gone for good, `errata restore --adopt` makes its artifacts the"
            " restored one's"
        )


def _check_empty(connection: Connection, backup: Backup) -> None:
    """Raises Conflict: a table has a row, or there are tables of another schema."""
    schema = schema_of(connection)
    known = MetaData()
    known.reflect(connection, only=lambda name, _: name not in ("alembic_version", "identity"))
    for table in known.tables.values():
        if connection.execute(select(exists(select(table)))).scalar_one():
            raise Conflict(
                f"the registry is not empty: {table.name} has rows; restore into a new ERRATA_DATA"
                " folder or a new database (ERRATA_DATABASE_URL)"
            )
    if known.tables and schema != backup.schema:
        raise Conflict(
            f"the database has tables of schema {schema}, the backup is of {backup.schema}; restore"
            " into a new one"
        )


def _fill(connection: Connection, table: Table, backups: Backups, backup: Backup) -> None:
    """Insert a table's rows; where its key is counted, count on from the last."""
    for column in table.columns:
        if isinstance(column.type, JSON):
            column.type = JSON(none_as_null=True)
    rows: Iterator[dict[str, Any]] = iter(backups.store.rows(backup.tables[table.name].digest))
    while batch := list(islice(rows, BATCH)):
        _check_columns(table, batch, backup)
        connection.execute(insert(table), batch)
    if connection.dialect.name == "postgresql" and "seq" in table.columns:
        last = connection.execute(select(func.max(table.c.seq))).scalar_one()
        if last is not None:
            counter = text("SELECT setval(pg_get_serial_sequence(:name, 'seq'), :last)")
            connection.execute(counter, {"name": table.name, "last": last})


def _check_columns(table: Table, rows: Sequence[dict[str, Any]], backup: Backup) -> None:
    names = set(table.columns.keys())
    if any(row.keys() != names for row in rows):
        raise ArtifactCorrupt(
            f"backup {backup.name}: the rows of {table.name} are not those of schema"
            f" {backup.schema}; take another"
        )
