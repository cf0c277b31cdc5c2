"""What every store of artifacts promises: one in a folder, and one in an object store."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.artifacts import ArtifactStore
from registry.errors import ArtifactCorrupt, NotFound
from registry.settings import Settings
from registry.stores import open_store
from tests.servers import S3Server


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    url = request.getfixturevalue("s3").url if request.param == "s3" else ""
    return open_store(Settings(data=tmp_path, artifacts=url))


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def damage(folder: Path, request: pytest.FixtureRequest) -> None:
    """Flip a bit of the one artifact, wherever it is kept."""
    (file,) = files(folder)
    data = bytearray(file.read_bytes())
    data[2] ^= 1
    file.write_bytes(data)
    if "s3" in request.fixturenames:
        s3: S3Server = request.getfixturevalue("s3")
        (copy,) = s3.copies(file.name)
        copy.write_bytes(data)


def test_put_and_get(store: ArtifactStore, tmp_path: Path) -> None:
    digest = store.put(b"delta")
    assert store.put(b"delta") == digest
    assert store.get(digest) == b"delta"
    assert len(files(tmp_path)) == 1


def test_one_flipped_bit_is_refused_and_writing_again_heals(
    store: ArtifactStore, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    digest = store.put(b"delta")
    damage(tmp_path, request)
    with pytest.raises(ArtifactCorrupt, match=digest):
        store.get(digest)
    store.put(b"delta")
    assert store.get(digest) == b"delta"


class Failing(ArtifactStore):
    """Its disk loses a bit between two reads."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fails = False

    def _check(self, digest: str) -> None:
        super()._check(digest)
        if self.fails:
            self._path(digest).write_bytes(b"dElta")


def test_what_changed_while_it_was_copied_is_told(store: ArtifactStore, tmp_path: Path) -> None:
    source = Failing(tmp_path / "source")
    digest = source.put(b"delta")
    store.copy(source, digest)
    assert store.get(digest) == b"delta"
    other = source.put(b"theta")
    source.fails = True
    with pytest.raises(ArtifactCorrupt, match=other):
        store.copy(source, other)
    assert not store.holds(other)


@pytest.mark.parametrize("digest", ["../../etc/passwd", "a" * 63, "A" * 64, "", "a" * 64])
def test_what_is_no_digest_or_not_there_is_not_found(store: ArtifactStore, digest: str) -> None:
    with pytest.raises(NotFound):
        store.get(digest)


def test_chunks_go_in_and_out_one_at_a_time(
    store: ArtifactStore, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    chunks = [b"a" * 3_000_000, b"", b"b"]
    digest = store.put_chunks(chunks)
    assert digest == ArtifactStore(tmp_path / "other").put(b"".join(chunks))
    shutil.rmtree(tmp_path / "other")
    assert b"".join(store.chunks(digest)) == b"".join(chunks)
    assert len(files(tmp_path)) == 1
    damage(tmp_path, request)
    for read in (store.chunks, store.rows):
        with pytest.raises(ArtifactCorrupt, match=digest):
            read(digest)
        with pytest.raises(NotFound):
            read("0" * 64)


def test_what_breaks_off_leaves_nothing(store: ArtifactStore, tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"begun"
        raise ValueError("and broken off")

    with pytest.raises(ValueError, match="broken"):
        store.put_chunks(chunks())
    assert files(tmp_path) == []


def test_rows(store: ArtifactStore) -> None:
    rows = [{"a": "line\nbreak\u2028"}, "text", [1, None], {"b": {"c": 0.5}}]
    kept = store.rows(store.put_rows(rows))
    assert list(kept) == rows
    assert (len(kept), kept[1], kept[-1]) == (4, "text", rows[3])
    assert (kept[1:3], kept[:0], kept[::-2]) == (rows[1:3], [], rows[::-2])
    with pytest.raises(IndexError):
        kept[4]
    assert list(store.rows(store.put_rows([]))) == []


def test_a_part_of_an_artifact_is_read_from_its_file(
    store: ArtifactStore, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    digest = store.put(b"0123456789")
    with store.opened(digest) as stream:
        assert stream.read(3) == b"012"
    file = store.file(digest)
    assert file.read_bytes() == b"0123456789"
    damage(tmp_path, request)
    with pytest.raises(ArtifactCorrupt):
        store.file(digest)
    with pytest.raises(NotFound):
        store.file("0" * 64)


def test_what_is_to_become_an_artifact_is_gone_afterwards(
    store: ArtifactStore, tmp_path: Path
) -> None:
    with store.scratch() as folder:
        (folder / "numbers").write_bytes(b"1")
        assert folder.is_relative_to(tmp_path)
    assert not folder.exists()
    assert files(tmp_path) == []
