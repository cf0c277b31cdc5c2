"""Garbage is what nothing names and nobody put lately; all else stays."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from registry import attempts, endpoints, files, jobs, tables, versions
from registry.artifacts import ArtifactStore
from registry.cached import CachedStore
from registry.checkpoints import record_checkpoint
from registry.database import Database
from registry.errors import Conflict, StoreUnavailable
from registry.files import ResultFile
from registry.garbage import Collector, digests_in, read_rows, roots
from registry.manifests import VersionManifest, sha256
from registry.moves import Target
from registry.objects import Objects
from registry.renewal import renew
from registry.resources import PREPROCESSING, add_resource, find_resources, use_resources
from registry.results import Result
from registry.versions import Version
from tests.unit.registry.conftest import BASE, TENANT, add_version

DAY = 24 * 3600.0


class Yard:
    """A registry and a store whose artifacts are all old.

    Args:
        mount: where an object store keeps them, of which ``folder`` is the cache then.
    """

    def __init__(self, database: Database, folder: Path, mount: Path | None) -> None:
        self.database = database
        self.folder = folder
        self.store = ArtifactStore(folder)
        if mount is not None:
            mount.mkdir()
            self.store = CachedStore(folder, Objects(f"file://{mount}", 1), 2**20)
        self._kept = mount or folder
        self.count = 0

    def put(self, data: bytes | None = None) -> str:
        """An artifact that was put long ago."""
        self.count += 1
        digest = self.store.put(data or f"artifact {self.count}".encode())
        self.age(digest)
        return digest

    def age(self, digest: str, seconds: float = 2 * DAY) -> None:
        then = time.time() - seconds
        place = self._kept / digest[:2] / digest
        for file in (place, *place.glob("*")):
            with suppress(FileNotFoundError):  # a copy may be gone where there is a newer one
                os.utime(file, (then, then))

    def lose(self, digest: str) -> None:
        for place in (self._kept / digest[:2] / digest, self.folder / digest[:2] / digest):
            shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)

    def copies(self, digest: str) -> int:
        place = self._kept / digest[:2] / digest
        return 1 if place.is_file() else len(list(place.iterdir()))

    def kept(self) -> set[str]:
        return {path.name for path in self._kept.glob("??/*")}

    def collect(self, grace: float = DAY, *, dry_run: bool = False) -> int:
        return Collector(self.database, self.store).collect(grace, dry_run=dry_run).count

    def version(self, *parents: Version, stack: tuple[str, ...] = (), **recipe: Any) -> Version:
        manifest = VersionManifest(BASE, stack, tuple(v.id for v in parents), recipe)
        with self.database.write() as connection:
            return versions.insert_version(connection, TENANT, manifest)

    def delete(self, version: Version) -> None:
        with self.database.write() as connection:
            versions.delete_version(connection, TENANT, version.id, actor="ada")

    def job(self, endpoint: str | None = None, **request: Any) -> attempts.Claim:
        with self.database.write() as connection:
            job = jobs.submit_job(
                connection,
                TENANT,
                "edit",
                base="atlas",
                request=request,
                actor="me",
                endpoint=endpoint,
            )
            claim = attempts.claim(connection, job.id, 1, "worker", 60)
        assert claim is not None
        return claim


@pytest.fixture(params=["folder", "objects"])
def yard(database: Database, tmp_path: Path, request: pytest.FixtureRequest) -> Yard:
    mount = tmp_path / "mount" if request.param == "objects" else None
    return Yard(database, tmp_path / "artifacts", mount)


def test_what_nothing_names_goes_and_is_counted(yard: Yard) -> None:
    garbage, named = yard.put(b"12345"), yard.put()
    yard.version(stack=(named,))
    assert yard.collect(dry_run=True) == 1
    assert yard.kept() == {garbage, named}
    swept = Collector(yard.database, yard.store).collect(DAY)
    assert (swept.count, swept.size) == (1, 5)
    assert yard.kept() == {named}
    assert yard.collect() == 0


def test_what_was_put_lately_stays_be_it_the_same_bytes_again(yard: Yard) -> None:
    again, fresh, old = yard.put(b"again"), yard.put(b"fresh"), yard.put(b"old")
    yard.age(fresh, DAY / 2)
    assert yard.store.put(b"again") == again
    chunks = yard.put(b"chunks")
    assert yard.store.put_chunks([b"chu", b"nks"]) == chunks
    yard.collect()
    assert yard.kept() == {again, fresh, chunks}
    assert old not in yard.kept()


def test_a_version_keeps_its_deltas_its_recipe_and_its_reports(yard: Yard) -> None:
    names = ("delta", "edits", "texts", "rows", "holds", "nested")
    found = {name: yard.put(name.encode()) for name in names}
    version = yard.version(
        stack=(found["delta"],),
        edits=found["edits"],
        guards={"texts": found["texts"]},
        steps=[{"rows": [found["rows"]]}],
    )
    report = {"holds": found["holds"], "future": {"field": [found["nested"]]}}
    with yard.database.write() as connection:
        versions.add_report(connection, TENANT, version.id, None, report)
    yard.collect()
    assert yard.kept() == set(found.values())
    yard.delete(version)
    yard.collect()
    assert yard.kept() == set()


def test_a_deleted_ancestor_keeps_what_is_read_of_its_recipe(yard: Yard) -> None:
    gone, shared, own, edits = (yard.put() for _ in range(4))
    first = yard.version(stack=(gone,), edits=edits)
    second = yard.version(first, stack=(shared,))
    third = yard.version(second, stack=(shared, own))
    yard.delete(first)
    yard.delete(second)
    yard.collect()
    assert yard.kept() == {shared, own, edits}  # the list of edits goes down the lineage
    yard.delete(third)
    yard.collect()
    assert yard.kept() == set()


def test_a_job_keeps_what_it_names_until_it_ends(yard: Yard) -> None:
    rows, state, older = (yard.put() for _ in range(3))
    claim = yard.job(warnings=["a long one. " * 200] * 20, rows=rows, guards={"texts": None})
    for digest in (older, state):
        with yard.database.write() as connection:
            record_checkpoint(connection, claim, 1, digest, {})
    yard.collect()
    assert yard.kept() == {rows, state}
    with yard.database.write() as connection:
        assert attempts.release(connection, claim.job.id, 1, 5)  # its worker died
    yard.collect()
    assert yard.kept() == {rows, state}
    with yard.database.write() as connection:
        jobs.cancel_job(connection, TENANT, claim.job.id, actor="ada")
    yard.collect()
    assert yard.kept() == set()


def test_what_a_job_made_long_ago_is_young_at_its_end(yard: Yard) -> None:
    delta, edits, holds, step, curves = (yard.put() for _ in range(5))
    result = Result(
        VersionManifest(BASE, (step, delta), (), {"edits": edits}),
        holds=holds,
        steps=[VersionManifest(BASE, (step,), (), {})],
        file=ResultFile("curves.csv", "export", 1, curves, 1),
    )
    claim = yard.job()
    for digest in (delta, edits, holds, step, curves):
        renew(yard.store, claim, result, DAY)
        yard.collect()
        assert yard.kept() == {delta, edits, holds, step, curves}
        data = yard.store.get(digest)
        yard.lose(digest)
        with pytest.raises(StoreUnavailable, match=digest):
            renew(yard.store, claim, result, DAY)
        yard.store.put(data)


def test_what_a_job_made_lately_is_not_put_again(yard: Yard) -> None:
    old, fresh, missing = yard.put(), yard.put(), sha256(b"missing")
    yard.age(fresh, DAY / 4)
    result = Result(VersionManifest(BASE, (old, fresh), (), {"texts": missing}))
    renew(yard.store, yard.job(begun=old), result, DAY)
    assert yard.copies(old) == yard.copies(fresh) == 1
    yard.age(fresh, DAY * 3 / 4)
    renew(yard.store, yard.job(begun=old), result, DAY)
    assert yard.copies(fresh) == (2 if isinstance(yard.store, CachedStore) else 1)


@pytest.mark.parametrize("named", [False, True])
def test_a_deleted_version_stays_while_a_job_works_on_it(yard: Yard, named: bool) -> None:
    """What the job makes will stand on its deltas, which nobody puts again."""
    delta, edits = yard.put(), yard.put()
    version, base = yard.version(stack=(delta,), edits=edits), yard.version()
    request = {"versions": [{"id": version.id}]} if named else {}
    endpoint = None if named else "facts"
    with yard.database.write() as connection:
        endpoints.create_endpoint(connection, TENANT, "facts", (Target(version.id),), actor="ada")
    claim = yard.job(endpoint, **request)
    with yard.database.write() as connection:
        moved = (Target(base.id),)
        endpoints.move_endpoint(
            connection, TENANT, "facts", moved, generation=1, kind="set", actor="ada"
        )
    yard.delete(version)
    yard.collect()
    assert yard.kept() == {delta, edits}
    with yard.database.write() as connection:
        attempts.cancel(connection, claim)
    yard.collect()
    assert yard.kept() == set()


def test_files_and_what_bases_need_stay(yard: Yard) -> None:
    content, rows, texts, examples = (yard.put() for _ in range(4))
    prepared = yard.put(json.dumps({"rows": examples, "counts": [1]}).encode())
    with yard.database.write() as connection:
        file = files.add_file(
            connection,
            TENANT,
            filename="a",
            purpose="texts",
            size=1,
            content=content,
            rows=rows,
            row_count=1,
            actor="ada",
        )
        add_resource(connection, BASE.digest, "sampled/100", "texts", texts)
        add_resource(connection, BASE.digest, "preprocessing/x", "rows", prepared)
    yard.collect()
    assert yard.kept() == {content, rows, texts, prepared, examples}
    with yard.database.write() as connection:
        files.delete_file(connection, TENANT, file.id, actor="ada")
    yard.collect()
    assert yard.kept() == {texts, prepared, examples}


def test_what_preprocessing_made_goes_once_no_job_needs_it(yard: Yard) -> None:
    rows, texts = yard.put(), yard.put()
    made = yard.put(json.dumps({"rows": rows, "counts": [1]}).encode())
    source = f"{PREPROCESSING}x"

    def used(days: float) -> None:
        resources = tables.resources
        with yard.database.write() as connection:
            connection.execute(resources.update().values(created_at=time.time() - days * DAY))

    with yard.database.write() as connection:
        add_resource(connection, BASE.digest, "sampled/100", "texts", texts)
        add_resource(connection, BASE.digest, source, "preprocessed", made)
    claim = yard.job()
    with yard.database.write() as connection:
        posted = time.time() - 9 * DAY
        connection.execute(tables.jobs.update().values(created_at=posted))
    used(8)  # by that job, or by one that has ended since
    yard.collect()
    assert yard.kept() == {rows, made, texts}
    with yard.database.write() as connection:
        attempts.cancel(connection, claim)
        use_resources(connection, BASE.digest, source)
    yard.collect()
    assert yard.kept() == {rows, made, texts}
    used(8)
    yard.job()  # it makes them anew, if it wants them
    yard.version(stack=(texts,), preprocessing={"rows": rows})
    yard.collect()
    assert yard.kept() == {rows, texts}
    with yard.database.read() as connection:
        assert find_resources(connection, BASE.digest, source) == {}


def test_every_table_is_looked_at(yard: Yard) -> None:
    """One that is forgotten here would lose what it names."""
    digest = yard.put()
    with yard.database.write() as connection:
        connection.execute(tables.tenants.insert().values(id=digest, created_at=0))
    yard.collect()
    assert yard.kept() == {digest}


def test_what_dead_writers_left_goes(yard: Yard) -> None:
    yard.put()
    half = yard.folder / ".tmp-half"
    half.write_bytes(b"half")
    with yard.store.scratch() as scratch:
        (scratch / "large").write_bytes(b"x")
        left = yard.folder / ".tmp-left"
        left.mkdir()
        (left / "file").write_bytes(b"y")
        then = time.time() - 2 * DAY
        for path in (half, left / "file", left, scratch):
            os.utime(path, (then, then))
        yard.collect()
        assert not half.exists()
        assert not left.exists()
        assert (scratch / "large").exists()  # it is at work
    assert not scratch.exists()


@pytest.mark.parametrize("seed", range(20))
def test_nothing_that_is_reached_is_deleted_and_nothing_else_is_kept(yard: Yard, seed: int) -> None:
    chosen = random.Random(seed)
    pool = [yard.put() for _ in range(30)]

    def some() -> tuple[str, ...]:
        return tuple(chosen.sample(pool, chosen.randrange(3)))

    made: list[Version] = []
    for place in range(6):
        parents = chosen.sample(made, min(len(made), chosen.randrange(3)))
        stack = some() or (pool[place],)
        made.append(yard.version(*parents, stack=stack, place=place, named=some()))
    deleted = {version.id for version in made if chosen.random() < 0.5}
    for version in made:
        if version.id in deleted:
            yard.delete(version)
    open_request, ended_request = some(), some()
    yard.job(named=open_request)
    ended = yard.job(named=ended_request)
    with yard.database.write() as connection:
        attempts.cancel(connection, ended)
    expected = set(open_request)
    for version in made:
        if version.id not in deleted:
            expected |= set(version.manifest.stack)
            ancestors = [version.id]
            while ancestors:
                one = next(v for v in made if v.id == ancestors[-1])
                ancestors.pop()
                expected |= set(one.manifest.recipe["named"])
                ancestors += one.manifest.parents
    yard.collect()
    assert yard.kept() == expected


def test_writers_and_a_collector_at_once(yard: Yard) -> None:
    """A put that returned is never undone, whatever is deleted meanwhile."""
    ended = threading.Event()
    lost: list[str] = []

    def write(name: str) -> None:
        for turn in range(150):
            data = f"{name} {turn % 3}".encode()
            digest = yard.store.put(data)
            if not yard.store.holds(digest) or yard.store.get(digest) != data:
                lost.append(digest)
            yard.age(digest)

    def collect() -> None:
        while not ended.is_set():
            yard.store.sweep(lambda _: False, time.time() - DAY, dry_run=False)

    collector = threading.Thread(target=collect)
    collector.start()
    writers = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    ended.set()
    collector.join()
    assert lost == []


class HeldUp(ArtifactStore):
    """One that is slow to read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.reading, self.goes_on = threading.Event(), threading.Event()

    def scan(self, digest: str, pattern: re.Pattern[str]) -> Iterator[str]:
        self.reading.set()
        assert self.goes_on.wait(60)
        return super().scan(digest, pattern)


def test_writers_do_not_wait_for_a_collector_that_reads(database: Database, tmp_path: Path) -> None:
    store = HeldUp(tmp_path / "artifacts")
    add_version(database, store.put(b"delta"))
    with ThreadPoolExecutor(1) as pool:
        collecting = pool.submit(Collector(database, store).collect, DAY)
        try:
            assert store.reading.wait(60)
            later = add_version(database, store.put(b"later"))
        finally:
            store.goes_on.set()
        collecting.result()
    with database.read() as connection:
        assert versions.get_version(connection, TENANT, later.id).id == later.id


def test_rows_are_understood_after_they_were_read(yard: Yard) -> None:
    """Until then SQLite's writers wait."""
    names = [yard.put() for _ in range(5)]
    delta, edits, holds, asked, hidden = names
    version = yard.version(stack=(delta,), edits=edits)
    with yard.database.write() as connection:
        versions.add_report(connection, TENANT, version.id, None, {"holds": holds})
    yard.job(named=asked, text=f"\u00ab{hidden}\b")  # as JSON, it begins with other digits
    with yard.database.read() as connection:
        rows = read_rows(connection)
    assert all(isinstance(row.manifest, str) for row in rows.versions)
    yard.delete(version)
    assert set(roots(rows)) >= set(names)


def test_nothing_is_collected_from_a_newer_schema(yard: Yard) -> None:
    """Another program may name there what this one does not know of."""
    garbage = yard.put()
    with yard.database.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(Conflict, match="schema 9999"):
        yard.collect()
    assert yard.kept() == {garbage}


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[Database]:
    """Another registry."""
    database = Database(f"sqlite:///{tmp_path / 'stranger.db'}")
    database.migrate()
    yield database
    database.close()


def test_artifacts_of_another_registry_stay(yard: Yard, stranger: Database) -> None:
    named = yard.put()
    yard.version(stack=(named,))
    assert yard.collect(dry_run=True) == 0
    assert yard.store.owner() is None
    assert yard.collect() == 0
    other = Collector(stranger, yard.store)
    for dry_run in (True, False):
        with pytest.raises(Conflict, match="errata gc --adopt") as told:
            other.collect(DAY, dry_run=dry_run)
        assert str(yard.store) in told.value.message
    assert yard.kept() == {named}
    assert yard.collect() == 0


def test_artifacts_can_be_adopted(yard: Yard, stranger: Database) -> None:
    named = yard.put()
    yard.version(stack=(named,))
    yard.collect()
    other = Collector(stranger, yard.store)
    assert other.collect(DAY, dry_run=True, adopt=True).count == 1
    assert yard.collect() == 0
    assert other.collect(DAY, adopt=True).count == 1
    assert yard.kept() == set()
    assert other.collect(DAY).count == 0
    with pytest.raises(Conflict):
        yard.collect()


def test_what_looks_like_a_digest() -> None:
    digest, other = sha256(b"a"), sha256(b"b")
    row = {"a": [digest, {"b": f"file/{other}"}], digest[:63]: 1, "c": digest + "0", "d": None}
    assert digests_in([row]) == {digest, other}
    assert digests_in([(digest, 1, None), [other]]) == {digest, other}
