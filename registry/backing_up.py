"""Taking a backup, of a service that runs or stands still.

The rows are those of one moment: of one transaction (REPEATABLE READ), on SQLite of a copy by its
backup interface, for which commits wait as long as the file takes to copy. What they reach is
copied afterwards. The garbage collector does not wait for that: where it deletes an artifact that
the rows of that moment reach and later ones do not, the rows are read anew.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, Table, select

from registry import __version__, tables
from registry.artifacts import ArtifactStore
from registry.backups import Backup, Backups, TableRows
from registry.database import Database
from registry.errors import Conflict, ErrataError, NotFound
from registry.garbage import Collector, read_rows, roots
from registry.manifests import BaseRef
from registry.schema import newest_schema, schema_of
from registry.versions import DELETED

#: Times that the rows are read where what they reach is deleted meanwhile.
TRIES = 3
BATCH = 1000


@dataclass(frozen=True)
class Taken:
    """A backup, and how much of it was not there before."""

    backup: Backup
    copied: int


@dataclass(frozen=True)
class _Snapshot:
    schema: str
    bases: list[BaseRef]
    rows: dict[str, TableRows]
    reached: frozenset[str]
    needed: frozenset[str]


def take_backup(
    database: Database,
    artifacts: ArtifactStore,
    backups: Backups,
    tell: Callable[[str], None] = lambda message: None,
) -> Taken:
    """Write a backup of a registry and of all artifacts that it reaches; ``tell`` hears of it.

    Of one that fails the artifacts that were copied stay for the next one, and nothing else.

    Raises:
        Conflict: the schema is not this program's. NotFound, ArtifactCorrupt: an artifact that is
        needed is missing or damaged.
    """
    left = TRIES
    while True:
        left -= 1
        found: list[str] = []
        try:
            return _take(database, artifacts, backups, found, tell)
        except BaseException as error:
            with suppress(ErrataError, OSError):
                backups.sweep(found)
            if not left or not isinstance(error, NotFound):
                raise


def _take(
    database: Database,
    artifacts: ArtifactStore,
    backups: Backups,
    found: list[str],
    tell: Callable[[str], None],
) -> Taken:
    """``found`` is filled with the digests of what is to be copied."""
    tell("reading the registry")
    snapshot = _read(database, backups.store)
    reached = Collector(database, artifacts).closure(snapshot.reached)
    found += sorted(_held(artifacts, reached, snapshot.needed))
    copied = _copy(artifacts, backups.store, found, tell)
    backup = Backup(
        created_at=int(time.time()),
        errata=__version__,
        schema=snapshot.schema,
        bases=snapshot.bases,
        tables=snapshot.rows,
        artifacts=TableRows(len(found), backups.store.put_rows(found)),
    )
    backups.add(backup)
    return Taken(backup, copied)


def _read(database: Database, store: ArtifactStore) -> _Snapshot:
    with _snapshot(database, store) as connection:
        schema, newest = schema_of(connection), newest_schema()
        if schema != newest:
            raise Conflict(
                f"the database has schema {schema}, this errata {newest}: back up with the errata"
                " that the service runs on, or start the service once with this one"
            )
        return _Snapshot(
            schema=newest,
            bases=[BaseRef(*row) for row in connection.execute(_BASES)],
            rows={table.name: _put(connection, table, store) for table in tables.CARRIED},
            reached=frozenset(roots(read_rows(connection))),
            needed=frozenset(_needed(connection)),
        )


_BASE = tables.versions.c.base, tables.versions.c.base_digest
_BASES = select(*_BASE).distinct().order_by(*_BASE)


@contextmanager
def _snapshot(database: Database, store: ArtifactStore) -> Iterator[Connection]:
    """The registry at one moment, without keeping writers of SQLite waiting for its readers."""
    with store.scratch() as folder:
        file = folder / "registry.db"
        with database.read() as connection:
            driver = connection.connection.driver_connection
            if not isinstance(driver, sqlite3.Connection):
                yield connection
                return
            _copy_file(driver, file)
        copy = Database(f"sqlite:///{file}")
        try:
            with copy.read() as connection:
                yield connection
        finally:
            copy.close()


def _copy_file(driver: sqlite3.Connection, file: Path) -> None:
    with closing(sqlite3.connect(file)) as copy:
        driver.backup(copy)


def _put(connection: Connection, table: Table, store: ArtifactStore) -> TableRows:
    """A table's rows, in the order of its key, as an artifact."""
    count = 0

    def lines() -> Iterator[bytes]:
        nonlocal count
        query = select(table).order_by(*table.primary_key.columns)
        for row in connection.execution_options(yield_per=BATCH).execute(query):
            count += 1
            yield json.dumps(dict(row._mapping)).encode() + b"\n"

    digest = store.put_chunks(lines())
    return TableRows(count, digest)


def _needed(connection: Connection) -> Iterator[str]:
    """Without these the restored service would not do what the rows promise."""
    versions, files = tables.versions, tables.files
    for row in connection.execute(select(versions.c.manifest).where(versions.c.status != DELETED)):
        yield from row.manifest["stack"]
    for row in connection.execute(select(files.c.content, files.c.rows)):
        yield from row
    yield from connection.execute(select(tables.resources.c.artifact)).scalars()


def _held(artifacts: ArtifactStore, reached: set[str], needed: frozenset[str]) -> Iterator[str]:
    """Of all that looks like a digest, what is one of an artifact."""
    for digest in reached:
        if artifacts.holds(digest):
            yield digest
        elif digest in needed:
            raise NotFound(
                f"artifact {digest} is not in the store, and a version, a file or what was prepared"
                " for a base needs it: put it back from an earlier backup, or delete what names it"
            )


def _copy(
    artifacts: ArtifactStore, store: ArtifactStore, digests: list[str], tell: Callable[[str], None]
) -> int:
    """Copy what is not there yet, compared with its digest on both sides; how many that were."""
    new = [digest for digest in digests if not store.holds(digest)]
    for place, digest in enumerate(new, start=1):
        tell(f"artifact {place} of {len(new)}")
        store.copy(artifacts, digest)
    return len(new)
