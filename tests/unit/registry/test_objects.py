"""Artifacts in an object store: what its clients may rely on, on a real server and on a mount."""

from __future__ import annotations

import fcntl
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from registry import versions
from registry.artifacts import ArtifactStore
from registry.cached import CachedStore
from registry.database import Database
from registry.errors import (
    ArtifactCorrupt,
    InvalidRequest,
    NotFound,
    StoreRefused,
    StoreUnavailable,
)
from registry.garbage import Collector
from registry.manifests import VersionManifest, sha256
from registry.objects import PART_BYTES, Objects
from registry.settings import Settings
from registry.stores import await_store, open_store
from tests.servers import S3Server
from tests.unit.registry.conftest import BASE, TENANT

FAR = 1e12  # a moment before which everything was put


@pytest.fixture(params=["s3", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return request.getfixturevalue("s3").url
    (tmp_path / "mounted").mkdir()
    return f"file://{tmp_path / 'mounted'}"


def machine(url: str, folder: Path, limit: int = 2**30, patience: float = 20) -> CachedStore:
    return CachedStore(folder, Objects(url, patience), limit)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_machines_see_each_others_artifacts(url: str, tmp_path: Path) -> None:
    one, two = machine(url, tmp_path / "one"), machine(url, tmp_path / "two")
    large = os.urandom(PART_BYTES + 1)  # two parts, two requests
    digests = {one.put(data): data for data in (b"", b"delta", large)}
    rows = one.put_rows([{"a": 1}, {"b": 2}])
    for digest, data in digests.items():
        assert two.holds(digest)
        assert two.get(digest) == data
        assert b"".join(two.chunks(digest)) == data
    assert list(two.rows(rows)) == [{"a": 1}, {"b": 2}]
    assert not two.holds("0" * 64)
    assert not two.holds("../../etc/passwd")
    with pytest.raises(NotFound):
        two.get("0" * 64)
    assert files(tmp_path / "two") == sorted([*digests, rows])


def test_the_cache_heals_itself(url: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    store = machine(url, folder)
    digest = store.put(b"delta")
    path = folder / digest[:2] / digest

    def opened() -> bytes:
        with store.open(digest) as stream:
            return stream.read()

    for read in (
        opened,
        lambda: store.get(digest),
        lambda: store.file(digest).read_bytes(),
        lambda: b"".join(store.chunks(digest)),
    ):
        flip(path)
        assert read() == b"delta"
        path.unlink()
        assert read() == b"delta"
        assert path.read_bytes() == b"delta"


def test_a_flipped_bit_in_the_store_is_refused_until_it_is_put_again(
    s3: S3Server, tmp_path: Path
) -> None:
    store, fresh = machine(s3.url, tmp_path / "one"), machine(s3.url, tmp_path / "two")
    digest = store.put(b"delta")
    flip(*s3.copies(digest))
    with pytest.raises(ArtifactCorrupt, match=digest):
        fresh.get(digest)
    assert files(tmp_path / "two") == []
    assert store.get(digest) == b"delta"  # this machine's own copy is whole
    assert store.put(b"delta") == digest
    assert fresh.get(digest) == b"delta"
    assert len(s3.copies(digest)) == 2


def test_what_breaks_off_leaves_nothing(url: str, tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"begun"
        raise ValueError("and broken off")

    store = machine(url, tmp_path / "cache")
    with pytest.raises(ValueError, match="broken"):
        store.put_chunks(chunks())
    assert files(tmp_path / "cache") == []
    assert Objects(url, 20).sweep(lambda _: False, FAR, dry_run=True).count == 0


def test_the_cache_keeps_to_its_limit_and_to_what_is_used(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.cached.RECENT_SECONDS", 0.0)
    folder = tmp_path / "cache"
    store = machine(url, folder, limit=5_000)
    digests = []
    for number in range(10):
        digests.append(store.put(bytes([number]) * 1000))
        time.sleep(0.02)  # files differ by their times
        store.get(digests[0])
    assert set(files(folder)) == {digests[0], *digests[-4:]}
    rows = store.rows(held := store.put_rows(range(500)))
    file = store.file(digests[1])
    for number in range(10, 30):
        store.put(bytes([number]) * 1000)
    assert held not in files(folder)
    assert (rows[7], list(rows)) == (7, [*range(500)])  # fetched again
    assert file.read_bytes() == bytes([1]) * 1000  # held, so not evicted
    assert all(store.get(digest) == bytes([n]) * 1000 for n, digest in enumerate(digests))


def test_garbage_goes_from_the_store_and_from_the_cache(url: str, tmp_path: Path) -> None:
    store, other = machine(url, tmp_path / "one"), machine(url, tmp_path / "two")
    kept, gone = store.put(b"kept"), store.put(b"gone")
    objects = Objects(url, 20)
    assert objects.sweep(kept.__eq__, objects.now() - 3600, dry_run=False).count == 0
    assert objects.sweep(kept.__eq__, FAR, dry_run=True).count == 1
    swept = store.sweep(kept.__eq__, FAR, dry_run=False)
    assert (swept.count, swept.size) == (1, 4)
    assert files(tmp_path / "one") == [kept]
    assert not other.holds(gone)
    with pytest.raises(NotFound):
        other.get(gone)
    assert other.get(kept) == b"kept"


def test_what_is_put_again_while_it_is_deleted_stays(url: str, tmp_path: Path) -> None:
    """A collector that has looked already deletes what it saw, and nothing else."""
    store, writer = machine(url, tmp_path / "one"), machine(url, tmp_path / "two")
    digest = store.put(b"delta")

    def nobody_wants_it(asked: str) -> bool:
        assert writer.put(b"delta") == asked
        return False

    assert Objects(url, 20).sweep(nobody_wants_it, FAR, dry_run=False).count == 1
    assert machine(url, tmp_path / "three").get(digest) == b"delta"


def test_of_copies_one_that_is_whole_is_kept(s3: S3Server, tmp_path: Path) -> None:
    store, objects = machine(s3.url, tmp_path / "cache"), Objects(s3.url, 20)
    for _ in range(3):
        digest = store.put(b"delta")
    whole = objects.copies(digest)[1]
    for copy in objects.copies(digest):
        if copy.key != whole.key:
            flip(s3.prefix / copy.key)
    assert objects.sweep(lambda _: True, FAR, dry_run=False).count == 2
    assert [copy.key for copy in objects.copies(digest)] == [whole.key]
    assert machine(s3.url, tmp_path / "fresh").get(digest) == b"delta"
    flip(s3.prefix / whole.key)
    store.put(b"delta")
    (other,) = (copy for copy in objects.copies(digest) if copy.key != whole.key)
    flip(s3.prefix / other.key)  # the server's clock ticks in seconds: either may be the newest
    assert objects.sweep(lambda _: True, FAR, dry_run=False).count == 0  # none is surely better


def test_other_objects_are_left_alone(s3: S3Server, tmp_path: Path) -> None:
    theirs = [s3.prefix / "readme.txt", s3.bucket / "other" / "ab" / ("ab" + "0" * 62)]
    for path in theirs:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"theirs")
    machine(s3.url, tmp_path / "cache").sweep(lambda _: False, FAR, dry_run=False)
    assert files(s3.bucket) == sorted(path.name for path in theirs)


def test_what_json_names_is_found_and_nothing_else_is_fetched(s3: S3Server, tmp_path: Path) -> None:
    store, folder = machine(s3.url, tmp_path / "one"), tmp_path / "two"
    digest = sha256(b"named")
    named, delta = store.put(f'{{"rows": "{digest}"}}'.encode()), store.put(b"\0" + b"a" * 100)
    fresh, pattern = machine(s3.url, folder), re.compile(r"[0-9a-f]{64}")
    assert list(fresh.scan(named, pattern)) == [digest]
    assert list(fresh.scan(delta, pattern)) == []
    assert list(fresh.scan("0" * 64, pattern)) == []
    assert files(folder) == [named]


@pytest.mark.parametrize("damaged", [b"", b"{", b"\0" * 74], ids=["empty", "short", "zeros"])
def test_a_damaged_cache_hides_no_name(url: str, tmp_path: Path, damaged: bytes) -> None:
    store, digest = machine(url, tmp_path / "cache"), sha256(b"named")
    naming = store.put(f'{{"rows": "{digest}"}}'.encode())
    file = tmp_path / "cache" / naming[:2] / naming
    file.write_bytes(damaged)
    assert list(store.scan(naming, re.compile(r"[0-9a-f]{64}"))) == [digest]
    assert sha256(file.read_bytes()) == naming


def test_a_copy_that_is_empty_hides_no_name(s3: S3Server, tmp_path: Path) -> None:
    store, digest = machine(s3.url, tmp_path / "one"), sha256(b"named")
    for _ in range(2):
        naming = store.put(f'{{"rows": "{digest}"}}'.encode())
    newest = Objects(s3.url, 20).copies(naming)[0]
    (s3.prefix / newest.key).write_bytes(b"")
    fresh = machine(s3.url, tmp_path / "two")
    assert list(fresh.scan(naming, re.compile(r"[0-9a-f]{64}"))) == [digest]


def test_a_file_in_use_costs_one_descriptor(tmp_path: Path) -> None:
    (tmp_path / "mounted").mkdir()
    store = machine(f"file://{tmp_path / 'mounted'}", tmp_path / "cache")
    digest = store.put(b"delta")
    path = store.file(digest)
    before = os.listdir("/proc/self/fd")
    for _ in range(1000):
        assert store.file(digest) == path
    flip(path)
    assert store.file(digest).read_bytes() == b"delta"
    assert len(os.listdir("/proc/self/fd")) == len(before)
    with path.open("rb") as stream, pytest.raises(BlockingIOError):
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_store_is_of_the_first_who_claims_it(url: str) -> None:
    start = threading.Barrier(4)

    def claim(name: str) -> str | None:
        objects = Objects(url, 20)
        start.wait()
        return objects.claim(name)

    names = [f"reg_{number}" for number in range(4)]
    assert Objects(url, 20).owner() is None
    with ThreadPoolExecutor(4) as pool:
        owners = set(pool.map(claim, names))
    (owner,) = owners
    assert owner in names
    other = "reg_other"
    assert Objects(url, 20).claim(other) == owner
    assert Objects(url, 20).claim(other, adopt=True) == other
    assert Objects(url, 20).owner() == other


def test_a_server_that_is_away_is_told_within_a_bound_and_borne(
    s3: S3Server, tmp_path: Path
) -> None:
    store = machine(s3.url, tmp_path / "cache", patience=2)
    digest, gone = store.put(b"delta"), machine(s3.url, tmp_path / "other").put(b"other")
    s3.signal(signal.SIGSTOP)
    try:
        for action in (lambda: store.put(b"new"), lambda: store.get(gone), lambda: store.now()):
            began = time.monotonic()
            with pytest.raises(StoreUnavailable, match="does not answer"):
                action()
            assert time.monotonic() - began < 20
        assert store.get(digest) == b"delta"
    finally:
        s3.signal(signal.SIGCONT)
    s3.kill()
    with pytest.raises(StoreUnavailable):
        store.put(b"new")
    assert files(tmp_path / "cache") == [digest]
    patient = CachedStore(tmp_path / "cache", Objects(s3.url, 60), 2**30)
    with ThreadPoolExecutor(1) as pool:
        put = pool.submit(patient.put, b"new")  # it is tried again until the server is there
        time.sleep(0.5)
        s3.start()
        new = put.result()
    assert machine(s3.url, tmp_path / "fresh").get(new) == b"new"
    assert store.get(gone) == b"other"


def test_nothing_that_a_row_reaches_is_lost_while_many_put_and_collect(
    s3: S3Server, tmp_path: Path, database: Database
) -> None:
    """Writers put a few artifacts over and over, name them in versions and delete those, while
    collectors with a short grace are at work."""
    grace, ended = 4.0, threading.Event()
    failed: list[BaseException] = []
    rounds = 0

    def write(seed: int) -> None:
        nonlocal rounds
        store, chosen = machine(s3.url, tmp_path / f"writer{seed}"), random.Random(seed)
        live: list[tuple[versions.Version, str]] = []
        while not ended.is_set():
            data = f"artifact {chosen.randrange(4)}".encode()
            began = time.monotonic()
            digest = store.put(data)
            if time.monotonic() - began > grace / 4:
                continue  # too slow for such a grace: the row would come too late
            manifest = VersionManifest(BASE, (digest,), (), {"round": chosen.random()})
            with database.write() as connection:
                version = versions.insert_version(connection, TENANT, manifest)
                on_time = time.monotonic() - began < grace / 2
                if not on_time:
                    versions.delete_version(connection, TENANT, version.id, actor="ada")
            if not on_time:
                continue
            live.append((version, digest))
            rounds += 1
            if len(live) > 2:
                version, _ = live.pop(0)
                with database.write() as connection:
                    versions.delete_version(connection, TENANT, version.id, actor="ada")
            for _, digest in live:
                assert store.holds(digest), f"{digest} was lost"

    def collect(number: int) -> None:
        collector = Collector(database, machine(s3.url, tmp_path / f"collector{number}"))
        while not ended.is_set():
            collector.collect(grace)

    def guarded(action: Callable[[int], None], number: int) -> None:
        try:
            action(number)
        except BaseException as error:
            failed.append(error)

    threads = [
        threading.Thread(target=guarded, args=(action, number))
        for action in (write, collect)
        for number in range(2)
    ]
    for thread in threads:
        thread.start()
    time.sleep(3 * grace)
    ended.set()
    for thread in threads:
        thread.join()
    assert failed == []
    assert rounds > 4
    collector = Collector(database, machine(s3.url, tmp_path / "last"))
    fresh = machine(s3.url, tmp_path / "fresh")
    reached = collector.reached() - {BASE.digest}
    assert reached
    assert all(fresh.get(digest) for digest in reached)
    time.sleep(grace + 1)
    collector.collect(grace)
    assert {path.parent.name for path in s3.prefix.glob("??/*/*")} == reached


@pytest.mark.parametrize(
    ("artifacts", "message"),
    [
        ("ftp://host/path", "s3://, gs://, az://, file://"),
        ("s3://", "names no bucket"),
        ("file:///not/there", "cannot be used"),
        ("s3://my bucket/x", "cannot be used"),
    ],
)
def test_a_url_that_cannot_work_names_the_setting_and_the_cure(
    tmp_path: Path, artifacts: str, message: str
) -> None:
    settings = Settings(data=tmp_path, artifacts=artifacts)
    for start in (open_store, await_store):
        with pytest.raises(InvalidRequest, match=re.escape(message)) as refused:
            start(settings)
        assert "ERRATA_ARTIFACTS" in refused.value.message


def test_a_missing_bucket_is_told_at_once(s3: S3Server, tmp_path: Path) -> None:
    began = time.monotonic()
    missing = Settings(data=tmp_path, artifacts="s3://nobody/there")
    with pytest.raises(InvalidRequest, match=r"ERRATA_ARTIFACTS: s3://nobody.* does not exist"):
        await_store(missing)
    assert time.monotonic() - began < 10
    with pytest.raises(StoreRefused):
        open_store(missing).put(b"delta")
    await_store(Settings(data=tmp_path, artifacts=s3.url))


def test_a_folder_is_a_folder_and_never_the_cache(tmp_path: Path) -> None:
    plain = Settings(data=tmp_path)
    assert type(open_store(plain)) is ArtifactStore
    assert plain.artifact_folder == tmp_path / "artifacts"
    elsewhere = Settings(data=tmp_path, artifacts=str(tmp_path / "elsewhere"))
    assert elsewhere.artifact_folder == tmp_path / "elsewhere"
    (tmp_path / "mounted").mkdir()
    remote = Settings(data=tmp_path, artifacts=f"file://{tmp_path / 'mounted'}")
    assert isinstance(open_store(remote), CachedStore)
    assert remote.artifact_folder == tmp_path / "cache"
