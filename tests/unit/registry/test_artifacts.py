from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.artifacts import ArtifactStore
from registry.errors import ArtifactCorrupt, NotFound


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_put_and_get(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    digest = store.put(b"delta")
    assert store.put(b"delta") == digest
    assert store.get(digest) == b"delta"
    assert len(files(tmp_path)) == 1


def test_one_flipped_bit_is_refused_and_writing_again_heals(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    digest = store.put(b"delta")
    (file,) = files(tmp_path)
    data = bytearray(file.read_bytes())
    data[2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactCorrupt, match=digest):
        store.get(digest)
    store.put(b"delta")
    assert store.get(digest) == b"delta"


@pytest.mark.parametrize("digest", ["../../etc/passwd", "a" * 63, "A" * 64, "", "a" * 64])
def test_what_is_no_digest_or_not_there_is_not_found(tmp_path: Path, digest: str) -> None:
    with pytest.raises(NotFound):
        ArtifactStore(tmp_path).get(digest)


def test_chunks_go_in_and_out_one_at_a_time(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    chunks = [b"a" * 3_000_000, b"", b"b"]
    digest = store.put_chunks(chunks)
    assert digest == store.put(b"".join(chunks))
    assert b"".join(store.chunks(digest)) == b"".join(chunks)
    assert len(files(tmp_path)) == 1
    (file,) = files(tmp_path)
    file.write_bytes(b"c" + file.read_bytes()[1:])
    for read in (store.chunks, store.rows):
        with pytest.raises(ArtifactCorrupt, match=digest):
            read(digest)
        with pytest.raises(NotFound):
            read("0" * 64)


def test_what_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"begun"
        raise ValueError("and broken off")

    with pytest.raises(ValueError, match="broken"):
        ArtifactStore(tmp_path).put_chunks(chunks())
    assert files(tmp_path) == []


def test_rows(tmp_path: Path) -> None:
    rows = [{"a": "line\nbreak\u2028"}, "text", [1, None], {"b": {"c": 0.5}}]
    store = ArtifactStore(tmp_path)
    kept = store.rows(store.put_rows(rows))
    assert list(kept) == rows
    assert (len(kept), kept[1], kept[-1]) == (4, "text", rows[3])
    assert (kept[1:3], kept[:0], kept[::-2]) == (rows[1:3], [], rows[::-2])
    with pytest.raises(IndexError):
        kept[4]
    assert list(store.rows(store.put_rows([]))) == []


def test_a_part_of_an_artifact_is_read_from_its_file(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    digest = store.put(b"0123456789")
    with store.opened(digest) as stream:
        assert stream.read(3) == b"012"
    file = store.file(digest)
    assert file.read_bytes() == b"0123456789"
    file.chmod(0o644)
    file.write_bytes(b"0123456780")
    with pytest.raises(ArtifactCorrupt):
        store.file(digest)
    with pytest.raises(NotFound):
        store.file("0" * 64)


def test_what_is_to_become_an_artifact_is_gone_afterwards(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    with store.scratch() as folder:
        (folder / "numbers").write_bytes(b"1")
        assert folder.parent == tmp_path / "artifacts"
    assert list((tmp_path / "artifacts").iterdir()) == []
