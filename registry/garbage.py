"""Which artifacts somebody may still ask for, and the deletion of the others.

Whatever looks like a digest, anywhere in the database, keeps an artifact, but for the rows that are
known to be over: an ended job with its events and checkpoints, a deleted version with its reports
(unless an unfinished job works on it: what that job makes will stand on the same deltas), and what
preprocessing made for ended jobs, which is deleted first.
Of a deleted version's manifest the recipe counts as long as a version that is there came from it:
the list of an endpoint's edits and a replay read it. What an artifact of JSON names is kept too.
A table or a field that is added later keeps what it names, without a word here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    ColumnElement,
    Connection,
    Dialect,
    Row,
    Select,
    String,
    Table,
    Text,
    TypeDecorator,
    cast,
    select,
)

from registry import tables
from registry.artifacts import ArtifactStore, Swept
from registry.database import Database
from registry.errors import Conflict
from registry.identity import claim_store
from registry.jobs import ENDED
from registry.resources import forget_preprocessed
from registry.schema import newest_schema, schema_of
from registry.versions import DELETED

_LENGTH = 64
_DIGEST = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
_VERSION = re.compile(r"ver_[0-9a-f]{40}")
_OF_JOBS = (tables.events, tables.checkpoints, tables.attempts)


class Collector:
    """Deletes what nothing reaches. What an artifact names is read once in this object's life."""

    def __init__(self, database: Database, artifacts: ArtifactStore) -> None:
        self._database = database
        self._artifacts = artifacts
        self._named: dict[str, frozenset[str]] = {}

    def reached(self) -> set[str]:
        """The digests of all that may still be asked for.

        Raises:
            Conflict: the schema is not this program's, and may name what this one does not see.
        """
        with self._database.read() as connection:
            self._check_schema(connection)
            rows = read_rows(connection)
        return self.closure(roots(rows))  # writers do not wait for what may take long

    def closure(self, named: Iterable[str]) -> set[str]:
        """Digests, and all that the artifacts among them name."""
        waiting = set(named)
        found: set[str] = set()
        while waiting:
            digest = waiting.pop()
            found.add(digest)
            waiting |= self._names(digest) - found
        return found

    def collect(self, grace: float, *, dry_run: bool = False, adopt: bool = False) -> Swept:
        """Delete what nothing reaches and nobody put in the last ``grace`` seconds.

        A write is safe while it is under way: bytes are put, anew or again, before a row names
        them, and stay for the grace time.

        Args:
            adopt: take the store from the registry that it is of.

        Raises:
            Conflict: the store is another registry's, which may reach what this one does not, or
                the schema another errata's.
        """
        claim_store(self._database, self._artifacts, adopt=adopt, dry_run=dry_run)
        if not dry_run:
            with self._database.write() as connection:
                self._check_schema(connection)
                forget_preprocessed(connection, max(grace, 0.0))
        before = self._artifacts.now() - grace  # a put that counts later is later
        reached = self.reached()
        return self._artifacts.sweep(reached.__contains__, before, dry_run=dry_run)

    def _check_schema(self, connection: Connection) -> None:
        schema, newest = schema_of(connection), newest_schema()
        if schema != newest:
            raise Conflict(
                f"{self._database} has schema {schema}, this errata {newest}: garbage is collected"
                " by the errata that the service was brought up to"
            )

    def _names(self, digest: str) -> frozenset[str]:
        if digest not in self._named:
            self._named[digest] = frozenset(self._artifacts.scan(digest, _DIGEST))
        return self._named[digest]


@dataclass(frozen=True)
class Rows:
    """What may name artifacts, of one moment. Its JSON is understood later: that takes long, and
    SQLite's writers wait for who reads.

    Attributes:
        texts: of rows that keep whatever they name.
        jobs: those that have not ended, each with the state that it began with.
    """

    texts: Sequence[str]
    jobs: Sequence[Row[Any]]
    versions: Sequence[Row[Any]]
    reports: Sequence[Row[Any]]


class _Written(str):
    """JSON as it is stored."""

    __slots__ = ()


class _AsWritten(TypeDecorator[_Written]):
    impl = Text
    cache_ok = True

    def process_result_value(self, value: Any, dialect: Dialect) -> _Written | None:
        return None if value is None else _Written(value)


def read_rows(connection: Connection) -> Rows:
    """All that ``roots`` looks at."""
    jobs, moves, versions, reports = tables.jobs, tables.moves, tables.versions, tables.reports
    unfinished = jobs.c.status.not_in(ENDED)
    special = {versions, reports, jobs, *_OF_JOBS}
    queries = [_select(table) for table in tables.metadata.sorted_tables if table not in special]
    ids = select(jobs.c.id).where(unfinished)
    queries += [_select(table).where(table.c.job_id.in_(ids)) for table in _OF_JOBS]
    claimed_at = (
        (moves.c.tenant == jobs.c.tenant)
        & (moves.c.endpoint == jobs.c.endpoint)
        & (moves.c.generation == jobs.c.claimed_generation)
    )
    working = _select(jobs).add_columns(_as_written(moves.c.after).label("began"))
    return Rows(
        texts=[
            text
            for query in queries
            for row in connection.execute(query)
            for text in row
            if text is not None and len(text) >= _LENGTH
        ],
        jobs=connection.execute(working.outerjoin(moves, claimed_at).where(unfinished)).all(),
        versions=connection.execute(_select(versions)).all(),
        reports=connection.execute(_select(reports)).all(),
    )


def roots(rows: Rows) -> Iterator[str]:
    """What the database names."""
    yield from digests_in(rows.texts)
    yield from digests_in(rows.jobs)
    yield from _of_versions(rows)


def digests_in(value: Any) -> frozenset[str]:
    """Everything in JSON, or in rows, that looks like a digest."""
    return frozenset(digest for text in _texts(value) for digest in _DIGEST.findall(text))


def _select(table: Table) -> Select[Any]:
    """All texts of a table's rows, those in JSON too."""
    textual = (column for column in table.columns if isinstance(column.type, JSON | String))
    return select(*map(_as_written, textual))


def _as_written(column: Column[Any]) -> ColumnElement[Any]:
    if not isinstance(column.type, JSON):
        return column
    return cast(column, _AsWritten).label(column.name)


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value, be it a key. (What a row prints of itself is cut short.)"""
    if isinstance(value, _Written):
        yield from _texts(json.loads(value))
    elif isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _texts(key)
            yield from _texts(part)
    elif isinstance(value, Iterable):
        for part in value:
            yield from _texts(part)


def _of_versions(rows: Rows) -> Iterator[str]:
    found = {(row.tenant, row.id): row for row in rows.versions}
    manifests = {key: json.loads(row.manifest) for key, row in found.items()}
    held = set(_held_versions(rows.jobs))
    live = {key for key, row in found.items() if row.status != DELETED or key in held}
    yield from digests_in(manifests[key] for key in live)
    ancestors: set[tuple[str, str]] = set()
    waiting = list(live)
    while waiting:
        tenant, version_id = waiting.pop()
        for parent in manifests[tenant, version_id]["parents"]:
            key = (tenant, parent)
            if key in found and key not in ancestors:
                ancestors.add(key)
                waiting.append(key)
    yield from digests_in(manifests[key]["recipe"] for key in ancestors - live)
    known = live | ancestors
    yield from digests_in(row.body for row in rows.reports if (row.tenant, row.version_id) in known)


def _held_versions(jobs: Iterable[Row[Any]]) -> Iterator[tuple[str, str]]:
    """(tenant, id) of what unfinished jobs work on: what they name, and where the endpoint pointed
    when they were claimed."""
    for row in jobs:
        for text in _texts(row):
            for version in _VERSION.findall(text):
                yield row.tenant, version
