"""Which artifacts somebody may still ask for, and the deletion of the others.

Whatever looks like a digest, anywhere in the database, keeps an artifact, but for the rows that are
known to be over: an ended job with its events and checkpoints, a deleted version with its reports
(unless an unfinished job works on it: what that job makes will stand on the same deltas).
Of a deleted version's manifest the recipe counts as long as a version that is there came from it:
the list of an endpoint's edits and a replay read it. What an artifact of JSON names is kept too.
A table or a field that is added later keeps what it names, without a word here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sqlalchemy import Connection, select

from registry import tables
from registry.artifacts import ArtifactStore, Swept
from registry.database import Database
from registry.jobs import ENDED
from registry.versions import DELETED

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
        """The digests of all that may still be asked for."""
        with self._database.read() as connection:
            return self.closure(roots(connection))

    def closure(self, named: Iterable[str]) -> set[str]:
        """Digests, and all that the artifacts among them name."""
        waiting = set(named)
        found: set[str] = set()
        while waiting:
            digest = waiting.pop()
            found.add(digest)
            waiting |= self._names(digest) - found
        return found

    def collect(self, grace: float, *, dry_run: bool = False) -> Swept:
        """Delete what nothing reaches and nobody put in the last ``grace`` seconds.

        A write is safe while it is under way: bytes are put, anew or again, before a row names
        them, and stay for the grace time.
        """
        before = self._artifacts.now() - grace  # a put that counts later is later
        reached = self.reached()
        return self._artifacts.sweep(reached.__contains__, before, dry_run=dry_run)

    def _names(self, digest: str) -> frozenset[str]:
        if digest not in self._named:
            self._named[digest] = frozenset(self._artifacts.scan(digest, _DIGEST))
        return self._named[digest]


def roots(connection: Connection) -> Iterator[str]:
    """What the database names."""
    special = {tables.versions, tables.reports, tables.jobs, *_OF_JOBS}
    for table in tables.metadata.sorted_tables:
        if table not in special:
            yield from digests_in(connection.execute(select(table)))
    jobs = tables.jobs
    unfinished = jobs.c.status.not_in(ENDED)
    yield from digests_in(connection.execute(select(jobs).where(unfinished)))
    for table in _OF_JOBS:
        query = select(table).where(table.c.job_id.in_(select(jobs.c.id).where(unfinished)))
        yield from digests_in(connection.execute(query))
    yield from _of_versions(connection)


def digests_in(value: Any) -> frozenset[str]:
    """Everything in JSON, or in rows, that looks like a digest."""
    return frozenset(digest for text in _texts(value) for digest in _DIGEST.findall(text))


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value, be it a key. (What a row prints of itself is cut short.)"""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _texts(key)
            yield from _texts(part)
    elif isinstance(value, Iterable):
        for part in value:
            yield from _texts(part)


def _of_versions(connection: Connection) -> Iterator[str]:
    table, reports = tables.versions, tables.reports
    rows = {(row.tenant, row.id): row for row in connection.execute(select(table))}
    held = set(_held_versions(connection))
    live = {key for key, row in rows.items() if row.status != DELETED or key in held}
    yield from digests_in(rows[key].manifest for key in live)
    ancestors: set[tuple[str, str]] = set()
    waiting = list(live)
    while waiting:
        tenant, version_id = waiting.pop()
        for parent in rows[tenant, version_id].manifest["parents"]:
            key = (tenant, parent)
            if key in rows and key not in ancestors:
                ancestors.add(key)
                waiting.append(key)
    yield from digests_in(rows[key].manifest["recipe"] for key in ancestors - live)
    for row in connection.execute(select(reports)):
        if (row.tenant, row.version_id) in live | ancestors:
            yield from digests_in([row.body])


def _held_versions(connection: Connection) -> Iterator[tuple[str, str]]:
    """(tenant, id) of what unfinished jobs work on: what they name, and where the endpoint pointed
    when they were claimed."""
    jobs, moves = tables.jobs, tables.moves
    claimed_at = select(jobs, moves.c.after).outerjoin(
        moves,
        (moves.c.tenant == jobs.c.tenant)
        & (moves.c.endpoint == jobs.c.endpoint)
        & (moves.c.generation == jobs.c.claimed_generation),
    )
    for row in connection.execute(claimed_at.where(jobs.c.status.not_in(ENDED))):
        for text in _texts(row):
            for version in _VERSION.findall(text):
                yield row.tenant, version
