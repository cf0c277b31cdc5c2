"""Backups hold a registry as it was at one moment; restored, it is the same, or there is none."""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import JSON, Boolean, Float, Integer, MetaData, Table, insert, select

from registry import __version__, files, jobs, tables, versions
from registry.artifacts import ArtifactStore
from registry.backing_up import Taken, take_backup
from registry.backups import Backup, Backups, TableRows
from registry.database import Database
from registry.errors import ArtifactCorrupt, Conflict, NotFound
from registry.garbage import Collector
from registry.identity import identity_of
from registry.manifests import VersionManifest, canonical_json
from registry.restoring import restore_backup
from registry.schema import newest_schema, schema_of, upgrade
from tests.servers import PostgresServer
from tests.unit.registry.conftest import BASE, TENANT

#: Where the kind of database matters: from it, and to it. Else SQLite does for both.
from_both = pytest.mark.parametrize("site", ["sqlite", "postgresql"], indirect=True)
to_both = pytest.mark.parametrize("other", ["sqlite", "postgresql"], indirect=True)

DAY = 24 * 3600.0


class Site:
    """A registry with its artifacts."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database = database
        self.folder = folder
        self.artifacts = ArtifactStore(folder)

    def version(self, *contents: bytes, **recipe: Any) -> VersionManifest:
        stack = tuple(self.artifacts.put(content) for content in contents)
        manifest = VersionManifest(BASE, stack, (), recipe)
        with self.database.write() as connection:
            versions.insert_version(connection, TENANT, manifest)
        return manifest

    def rows(self) -> dict[str, list[Any]]:
        with self.database.read() as connection:
            return {
                table.name: connection.execute(
                    select(table).order_by(*table.primary_key.columns)
                ).all()
                for table in tables.CARRIED
            }

    def take(self, backups: Backups, tell: Callable[[str], None] = str) -> Taken:
        return take_backup(self.database, self.artifacts, backups, tell)

    def restore(self, backups: Backups, backup: Backup, *, adopt: bool = False) -> None:
        restore_backup(backups, backup, self.database, self.artifacts, adopt=adopt)

    def path(self, digest: str) -> Path:
        return self.folder / digest[:2] / digest


@contextmanager
def new_site(request: pytest.FixtureRequest, folder: Path) -> Iterator[Site]:
    """Without any table; on SQLite, where the test does not ask for the other kind."""
    url, name = f"sqlite:///{folder / 'registry.db'}", None
    if getattr(request, "param", "sqlite") == "postgresql":
        postgres: PostgresServer = request.getfixturevalue("postgres")
        name = postgres.new_database()
        url = postgres.url(name)
    database = Database(url)
    yield Site(database, folder / "artifacts")
    database.close()
    if name is not None:
        postgres.drop(name)


@pytest.fixture
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    with new_site(request, tmp_path / "site") as site:
        site.database.migrate()
        yield site


@pytest.fixture
def other(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    with new_site(request, tmp_path / "other") as site:
        yield site


@pytest.fixture
def backups(tmp_path: Path) -> Backups:
    backups = Backups(tmp_path / "backups")
    backups.folder.mkdir()
    return backups


def some_row(table: Table, number: int) -> dict[str, Any]:
    """Values by their columns' types; the second row leaves out what may be left out."""
    values: dict[str, Any] = {}
    for column in table.columns:
        if column.nullable and number > 1:
            values[column.name] = None
        elif isinstance(column.type, JSON):
            values[column.name] = {"z": [1, 0.1 + 0.2, None, True], "ä": "\n\"é'\ud800"}
        elif isinstance(column.type, Boolean):
            values[column.name] = number == 1
        elif isinstance(column.type, Integer):
            values[column.name] = 2**31 - number
        elif isinstance(column.type, Float):
            values[column.name] = 1.7e9 + number / 3
        else:
            values[column.name] = f"text {number}"
    if table is tables.versions:
        values["manifest"] = VersionManifest(BASE).to_json()
    return values


@from_both
@to_both
def test_every_row_of_every_table_comes_back(site: Site, other: Site, backups: Backups) -> None:
    with site.database.write() as connection:
        for table in tables.CARRIED:
            connection.execute(insert(table), [some_row(table, 1), some_row(table, 2)])
    before = site.rows()
    backup = site.take(backups).backup
    assert {name: rows.rows for name, rows in backup.tables.items()} == dict.fromkeys(before, 2)
    assert (backup.schema, backup.errata) == (newest_schema(), __version__)
    assert backups.read() == backup
    other.restore(backups, backup)
    assert other.rows() == before
    with other.database.read() as connection:
        assert schema_of(connection) == newest_schema()


@to_both
def test_what_is_added_after_a_restore_comes_after(
    site: Site, other: Site, backups: Backups
) -> None:
    for number in range(3):
        site.version(f"delta {number}".encode())
    other.restore(backups, site.take(backups).backup)
    added = other.version(b"another")
    with other.database.read() as connection:
        newest = versions.list_versions(connection, TENANT).items[0]
    assert newest.id == added.id


def test_artifacts_that_are_reached_come_along(site: Site, other: Site, backups: Backups) -> None:
    texts = site.artifacts.put(b"what the rows name")
    rows = site.artifacts.put(canonical_json([{"examples": texts}]))
    manifest = site.version(b"a delta", b"another", edits=rows)
    lonely = site.artifacts.put(b"nobody wants this")
    taken = site.take(backups)
    assert (taken.copied, taken.backup.artifacts.rows) == (4, 4)
    assert taken.backup.bases == [BASE]
    assert backups.read().bases == [BASE]
    other.restore(backups, taken.backup)
    for digest in (*manifest.stack, rows, texts):
        assert other.artifacts.get(digest) == site.artifacts.get(digest)
    assert not other.artifacts.holds(lonely)


def test_the_next_backup_copies_what_is_new(site: Site, other: Site, backups: Backups) -> None:
    first = site.version(b"old")
    old = site.take(backups).backup
    (delta,) = first.stack
    inode = (backups.folder / "artifacts" / delta[:2] / delta).stat().st_ino
    site.version(b"new")
    taken = site.take(backups)
    assert (taken.copied, taken.backup.artifacts.rows) == (1, 2)
    assert (backups.folder / "artifacts" / delta[:2] / delta).stat().st_ino == inode
    assert sorted(backups.names()) == sorted({old.name, taken.backup.name})
    other.restore(backups, backups.read(old.name))
    with other.database.read() as connection:
        found = versions.list_versions(connection, TENANT).items
    assert [version.id for version in found] == [first.id]


def test_old_backups_are_deleted_with_what_only_they_hold(site: Site, backups: Backups) -> None:
    gone = site.version(b"gone")
    kept = site.version(b"kept")
    old = site.take(backups).backup
    with site.database.write() as connection:
        versions.delete_version(connection, TENANT, gone.id, actor="ada")
    while time.time() < old.created_at + 1:  # a backup is named by its second
        time.sleep(0.05)
    new = site.take(backups).backup
    lost = {*backups.digests(old)} - {*backups.digests(new)}
    assert gone.stack[0] in lost
    assert backups.keep(2).count == 0
    assert backups.keep(1).count == len(lost)
    assert backups.names() == [new.name]
    backups.verify(new)
    assert backups.store.holds(kept.stack[0])
    assert not backups.store.holds(gone.stack[0])


def test_nothing_is_deleted_for_a_backup_that_is_damaged(site: Site, backups: Backups) -> None:
    old = site.take(backups).backup
    while time.time() < old.created_at + 1:  # a backup is named by its second
        time.sleep(0.05)
    site.version(b"new")
    new = site.take(backups).backup
    (backups.folder / f"{new.name}.json").write_bytes(b"{}")
    with pytest.raises(ArtifactCorrupt, match="is damaged"):
        backups.keep(1)
    assert backups.names() == [old.name, new.name]
    backups.verify(old)


def test_a_backup_that_fails_leaves_what_the_next_one_needs(site: Site, backups: Backups) -> None:
    first = site.take(backups).backup
    (one,), (two,) = site.version(b"one").stack, site.version(b"two").stack

    def tell(message: str) -> None:
        if message == "artifact 2 of 2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        site.take(backups, tell)
    (copied,) = set(backups.store.digests()) - set(backups.digests(first))
    assert copied in {one, two}
    site.path(two).unlink()
    with pytest.raises(NotFound, match=two):
        site.take(backups)
    assert set(backups.store.digests()) == set(backups.digests(first))


@from_both
def test_rows_are_those_of_one_moment(site: Site, backups: Backups) -> None:
    """A writer adds a job with its event and its entry; no backup has one without the others."""
    ended = threading.Event()
    errors: list[BaseException] = []

    def write() -> None:
        try:
            while not ended.is_set():
                with site.database.write() as connection:
                    jobs.submit_job(
                        connection, TENANT, "edit", base="atlas", request={}, actor="ada"
                    )
        except BaseException as error:
            errors.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        counts = []
        for _ in range(5):
            made = site.take(backups).backup.tables
            counts.append(made["jobs"].rows)
            assert made["audit"].rows == made["events"].rows == counts[-1]
    finally:
        ended.set()
        writer.join()
    assert errors == []
    assert all(earlier <= later for earlier, later in pairwise(counts))
    assert counts[-1] > 0


def test_what_is_deleted_meanwhile_is_missed_by_no_backup(site: Site, backups: Backups) -> None:
    gone, kept = site.version(b"gone"), site.version(b"kept")

    def tell(message: str) -> None:
        """Between the rows and the artifacts, once: delete and collect."""
        if message.startswith("artifact 1 of 2"):
            with site.database.write() as connection:
                versions.delete_version(connection, TENANT, gone.id, actor="ada")
            assert Collector(site.database, site.artifacts).collect(-60).count == 1

    backup = site.take(backups, tell).backup
    assert backups.artifacts(backup) == list(kept.stack)


def test_a_needed_artifact_that_is_missing_or_damaged_stops_a_backup(
    site: Site, backups: Backups
) -> None:
    (delta,) = site.version(b"a delta").stack
    file = site.path(delta)
    data = file.read_bytes()
    file.write_bytes(data[:-1] + b"?")
    with pytest.raises(ArtifactCorrupt, match=delta):
        site.take(backups)
    file.unlink()
    with pytest.raises(NotFound, match=f"{delta} is not in the store"):
        site.take(backups)
    assert backups.names() == []
    site.artifacts.put(data)
    assert backups.read(site.take(backups).backup.name).artifacts.rows == 1


def test_a_backup_that_is_broken_off_is_none(site: Site, backups: Backups) -> None:
    site.version(b"a delta")

    def tell(message: str) -> None:
        if message.startswith("artifact"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        site.take(backups, tell)
    with pytest.raises(NotFound, match="holds no backup"):
        backups.read()
    taken = site.take(backups)
    backups.verify(taken.backup)
    assert list(backups.folder.rglob(".tmp*")) == []


@pytest.mark.parametrize("what", ["rows", "artifact", "list", "manifest"])
@pytest.mark.parametrize("how", ["changed", "missing"])
def test_a_damaged_backup_is_refused_and_leaves_nothing(
    site: Site, other: Site, backups: Backups, what: str, how: str
) -> None:
    (delta,) = site.version(b"a delta").stack
    backup = site.take(backups).backup
    digests = {
        "rows": backup.tables["versions"].digest,
        "artifact": delta,
        "list": backup.artifacts.digest,
    }
    file = backups.folder / f"{backup.name}.json"
    if what in digests:
        file = backups.folder / "artifacts" / digests[what][:2] / digests[what]
    data = file.read_bytes()
    file.unlink()
    if how == "changed":
        file.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    with pytest.raises((ArtifactCorrupt, NotFound)) as refused:
        other.restore(backups, backups.read(backup.name))
    assert backup.name in refused.value.message
    assert list(other.folder.glob("*")) == []
    with other.database.read() as connection:
        assert schema_of(connection) is None
    file.write_bytes(data)
    other.restore(backups, backups.read())
    assert other.rows() == site.rows()


@to_both
def test_a_registry_that_holds_something_is_left_alone(
    site: Site, other: Site, backups: Backups
) -> None:
    backup = site.take(backups).backup
    other.database.migrate()
    other.version(b"its own")
    before = other.rows()
    with pytest.raises(Conflict, match="not empty: versions has rows"):
        other.restore(backups, backup)
    assert other.rows() == before


def test_an_empty_registry_with_its_tables_is_filled(
    site: Site, other: Site, backups: Backups
) -> None:
    site.version(b"a delta")
    backup = site.take(backups).backup
    other.database.migrate()
    other.restore(backups, backup)
    assert other.rows() == site.rows()


@to_both
def test_rows_that_do_not_fit_leave_nothing(site: Site, other: Site, backups: Backups) -> None:
    """The last table fails; those before it were filled in the same transaction."""
    site.version(b"a delta")
    backup = site.take(backups).backup
    last = list(backup.tables)[-1]
    wrong = TableRows(1, backups.store.put_rows([{"no": "column"}]))
    forged = replace(backup, tables={**backup.tables, last: wrong})
    with pytest.raises(ArtifactCorrupt, match=f"rows of {last}"):
        other.restore(backups, forged)
    with other.database.read() as connection:
        assert schema_of(connection) is None
    other.restore(backups, backup)


@to_both
def test_a_newer_schema_is_refused_and_an_older_one_brought_up(
    site: Site, other: Site, backups: Backups, tmp_path: Path
) -> None:
    backup = site.take(backups).backup
    newer = replace(backup, schema="9999", errata="7.0")
    with pytest.raises(Conflict, match=r"schema 9999.*errata 7\.0 or a later"):
        other.restore(backups, newer)
    old = Database(f"sqlite:///{tmp_path / 'old.db'}")
    known = MetaData()
    with old.write() as connection:
        upgrade(connection, "0005")
        known.reflect(connection, only=lambda name, _: name != "alembic_version")
    with pytest.raises(Conflict, match="has schema 0005"):
        take_backup(old, site.artifacts, backups)
    old.close()
    rows: dict[str, list[dict[str, Any]]] = {table.name: [] for table in known.sorted_tables}
    rows["tenants"] = [{"id": "ada", "created_at": 1.5}]
    filled = {name: TableRows(len(r), backups.store.put_rows(r)) for name, r in rows.items()}
    older = replace(backup, schema="0005", tables=filled)
    other.restore(backups, older)
    assert other.rows()["tenants"] == [("ada", 1.5)]
    assert other.rows()["audit"] == []


@to_both
def test_a_restored_registry_is_another(site: Site, other: Site, backups: Backups) -> None:
    """Even an empty one that has a name already; it deletes nothing of the first one's."""
    manifest = site.version(b"a delta")
    Collector(site.database, site.artifacts).collect(0)
    other.database.migrate()
    Collector(other.database, other.artifacts).collect(0)
    other.restore(backups, site.take(backups).backup)
    assert other.artifacts.owner() != site.artifacts.owner()
    later = site.version(b"later")
    with pytest.raises(Conflict, match=f"are those of registry {site.artifacts.owner()}"):
        Collector(other.database, site.artifacts).collect(-60)
    assert Collector(site.database, site.artifacts).collect(-60).count == 0
    assert Collector(other.database, other.artifacts).collect(-60).count == 0
    assert all(site.artifacts.holds(digest) for digest in (*manifest.stack, *later.stack))


@to_both
def test_the_store_of_another_registry_is_adopted_or_left_alone(
    site: Site, other: Site, backups: Backups
) -> None:
    manifest = site.version(b"a delta")
    Collector(site.database, site.artifacts).collect(DAY)
    first = site.artifacts.owner()
    backup = site.take(backups).backup
    other.artifacts = site.artifacts  # as where the database is lost, and the store is not
    with pytest.raises(Conflict, match=rf"of registry {first}.*`errata restore --adopt`"):
        other.restore(backups, backup)
    with other.database.read() as connection:
        assert schema_of(connection) is None
    other.restore(backups, backup, adopt=True)
    assert other.rows() == site.rows()
    assert site.artifacts.owner() != first
    assert Collector(other.database, site.artifacts).collect(-60).count == 0
    with pytest.raises(Conflict):
        Collector(site.database, site.artifacts).collect(-60)
    assert site.artifacts.holds(*manifest.stack)


def test_a_store_of_nobody_is_the_restored_registry_s(
    site: Site, other: Site, backups: Backups
) -> None:
    other.restore(backups, site.take(backups).backup)
    with other.database.read() as connection:
        assert other.artifacts.owner() == identity_of(connection)


def test_one_writes_at_a_time(backups: Backups, tmp_path: Path) -> None:
    with backups.locked(write=False):
        with backups.locked(write=False):
            pass
        with pytest.raises(Conflict, match="in use"), backups.locked(write=True):
            pass
    with backups.locked(write=True), pytest.raises(Conflict), backups.locked(write=False):
        pass
    left = [backups.folder / ".tmp-manifest", backups.folder / "artifacts" / ".tmp-rows"]
    left[1].mkdir(parents=True)
    left[0].touch()
    (left[1] / "registry.db").touch()
    with backups.locked(write=True):
        assert not any(path.exists() for path in left)
    nowhere = Backups(tmp_path / "nowhere")
    with pytest.raises(NotFound), nowhere.locked(write=False):
        pass
    with nowhere.locked(write=True):
        assert nowhere.names() == []
    for folder in (nowhere.folder, nowhere.folder / "artifacts"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_files_come_along_with_their_content(site: Site, other: Site, backups: Backups) -> None:
    content = site.artifacts.put(b"a b c")
    with site.database.write() as connection:
        made = files.add_file(
            connection,
            TENANT,
            filename="a.txt",
            purpose="texts",
            size=5,
            content=content,
            rows=content,
            row_count=1,
            actor="ada",
        )
    other.restore(backups, site.take(backups).backup)
    with other.database.read() as connection:
        assert files.get_file(connection, TENANT, made.id) == made
    assert other.artifacts.get(content) == b"a b c"
