"""Backups in a folder: one small manifest each, over artifacts that all of them share.

    <folder>/20261126T064000Z-0123456789abcdef.json    the manifest; its name says its digest
    <folder>/artifacts/ab/abcdef…                      tables as JSON lines, and the artifacts

A backup is there once its manifest is: that is written last, under another name first. What an
earlier backup holds is not copied again.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from registry.artifacts import TEMPORARY, ArtifactStore, Swept
from registry.errors import ArtifactCorrupt, Conflict, NotFound
from registry.manifests import BaseRef, canonical_json, sha256

FORMAT = "errata-backup-1"
ARTIFACTS = "artifacts"
_NAME = re.compile(r"\d{8}T\d{6}Z-([0-9a-f]{16})\.json")


@dataclass(frozen=True)
class TableRows:
    """A table's rows: how many, and the digest of the artifact that holds them."""

    rows: int
    digest: str


@dataclass(frozen=True)
class Backup:
    """The manifest of a backup.

    Attributes:
        errata: the version of this program that wrote it.
        schema: the revision of the database's schema.
        bases: those that versions stand on, which are not in the backup.
        tables: in an order in which they may be filled.
        artifacts: the digest of the list of artifacts, and how many they are.
    """

    created_at: int
    errata: str
    schema: str
    bases: Sequence[BaseRef]
    tables: Mapping[str, TableRows]
    artifacts: TableRows

    @cached_property
    def name(self) -> str:
        """By which it is chosen: when it was made, and the digest of its manifest."""
        when = datetime.fromtimestamp(self.created_at, UTC)
        return f"{when:%Y%m%dT%H%M%SZ}-{sha256(self.to_bytes())[:16]}"

    def to_bytes(self) -> bytes:
        """JSON that keeps the tables' order."""
        body = {"format": FORMAT, **asdict(self), "tables": [*_in_order(self.tables)]}
        return canonical_json(body)

    @classmethod
    def from_bytes(cls, data: bytes) -> Backup:
        """Raises ValueError, TypeError or KeyError: they are no manifest."""
        body: dict[str, Any] = json.loads(data)
        if body.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        bases = [BaseRef(**entry) for entry in body.pop("bases")]
        tables = {entry.pop("name"): TableRows(**entry) for entry in body.pop("tables")}
        return cls(bases=bases, tables=tables, artifacts=TableRows(**body.pop("artifacts")), **body)


class Backups:
    """The backups of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = ArtifactStore(folder / ARTIFACTS)

    def names(self) -> list[str]:
        """Those that are whole, oldest first."""
        return sorted(path.stem for path in self.folder.glob("*.json") if _NAME.match(path.name))

    def read(self, name: str | None = None) -> Backup:
        """A backup's manifest; by default the newest.

        Raises:
            NotFound: it is not there. ArtifactCorrupt: it is damaged.
        """
        names = self.names()
        if not names or (name is not None and name not in names):
            raise NotFound(
                f"{self.folder} holds no backup {name or ''}".rstrip()
                + (f"; there is {', '.join(names)}" if names else "; `errata backup` makes one")
            )
        file = self.folder / f"{name or names[-1]}.json"
        data = file.read_bytes()
        if not sha256(data).startswith(file.stem.rpartition("-")[2]):
            raise ArtifactCorrupt(f"{file} is damaged: its digest is {sha256(data)}; use another")
        try:
            return Backup.from_bytes(data)
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactCorrupt(
                f"{file} was written by another errata than this one: {error!r}; use that one"
            ) from None

    def add(self, backup: Backup) -> None:
        """Write a manifest, once all that it names is in the store; durable when it returns."""
        temporary = self.folder / f"{TEMPORARY}{backup.name}"
        with temporary.open("wb") as stream:
            stream.write(backup.to_bytes())
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self.folder / f"{backup.name}.json")
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def digests(self, backup: Backup) -> Iterator[str]:
        """All that a backup needs of the store. Raises ArtifactCorrupt."""
        yield from (table.digest for table in backup.tables.values())
        yield backup.artifacts.digest
        yield from self.artifacts(backup)

    def artifacts(self, backup: Backup) -> list[str]:
        """The digests of the artifacts in a backup. Raises ArtifactCorrupt."""
        with self.whole(backup):
            return list(self.store.rows(backup.artifacts.digest))

    def verify(self, backup: Backup) -> None:
        """Read all of a backup and compare it with its digests. Raises ArtifactCorrupt."""
        with self.whole(backup):
            for digest in self.digests(backup):
                for _ in self.store.chunks(digest):
                    pass
        for name, table in {**backup.tables, "artifacts": backup.artifacts}.items():
            if len(self.store.rows(table.digest)) != table.rows:
                raise ArtifactCorrupt(f"backup {backup.name}: {name} does not have its rows")

    def keep(self, count: int) -> Swept:
        """Delete all backups but the newest, and what only they held.

        Raises:
            ArtifactCorrupt: one of the newest is damaged; nothing was deleted.
        """
        names = self.names()
        held = self._held(names[-count:])
        for name in names[:-count]:
            (self.folder / f"{name}.json").unlink()
        return self._sweep(held)

    def sweep(self, kept: Iterable[str] = ()) -> Swept:
        """Delete what no backup holds, nor is to be ``kept``. Raises ArtifactCorrupt."""
        return self._sweep(self._held(self.names()).union(kept))

    def _held(self, names: Iterable[str]) -> set[str]:
        return {digest for name in names for digest in self.digests(self.read(name))}

    def _sweep(self, held: set[str]) -> Swept:
        return self.store.sweep(held.__contains__, float("inf"), dry_run=False)

    @contextmanager
    def whole(self, backup: Backup) -> Iterator[None]:
        """Within it whatever is missing is the backup's damage."""
        try:
            yield
        except (NotFound, ArtifactCorrupt) as error:
            raise ArtifactCorrupt(
                f"backup {backup.name} in {self.folder} is damaged: {error.message}"
            ) from None

    @contextmanager
    def locked(self, *, write: bool) -> Iterator[None]:
        """One writes at a time, and none while another reads. For a writer the folder is made, and
        what one that was killed left half written is deleted.

        Raises:
            Conflict: somebody is at it. NotFound: there is no such folder.
        """
        if write:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.folder / ARTIFACTS).mkdir(mode=0o700, exist_ok=True)
        try:
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise NotFound(f"{self.folder} is no folder of backups: {error.strerror}") from None
        try:
            with _refusing(self.folder):
                fcntl.flock(descriptor, (fcntl.LOCK_EX if write else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            if write:
                self._clear()
            yield
        finally:
            os.close(descriptor)

    def _clear(self) -> None:
        for path in self.folder.glob(f"{TEMPORARY}*"):
            path.unlink()
        self.store.sweep(lambda _: True, float("inf"), dry_run=False)


@contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    try:
        yield
    except BlockingIOError:
        raise Conflict(f"{folder} is in use by another backup or restore; wait for it") from None


def _in_order(tables: Mapping[str, TableRows]) -> Iterator[dict[str, Any]]:
    return ({"name": name, **asdict(table)} for name, table in tables.items())
