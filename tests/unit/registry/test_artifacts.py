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
