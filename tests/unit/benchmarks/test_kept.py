"""Rows of a long bench outlive whatever breaks it off."""

import os
from pathlib import Path

import pytest

from benchmarks.kept import Kept
from registry.errors import InvalidRequest


def kept(file: Path, size: int = 1) -> Kept:
    return Kept(file, ["benchmarks"], size=size)


def test_a_run_goes_on_from_the_rows_that_are_whole(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    first = kept(file)
    for number in (1, 2):
        first.add({"number": number})
    with file.open("ab") as stream:
        stream.write(b'{"number": ')
    again = kept(file)
    assert again.rows == [{"number": 1}, {"number": 2}]
    again.add({"number": 3})
    assert kept(file).rows[-1] == {"number": 3}
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(InvalidRequest, match="other settings"):
        kept(file, size=2)


def test_no_row_is_lost_where_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    kept(file).add({"number": 1})

    def full(_: int) -> None:
        raise OSError("no space left on the device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        file_before = file.read_bytes()
        with pytest.raises(OSError, match="no space"):
            kept(file)
    assert file.read_bytes() == file_before
    assert kept(file).rows == [{"number": 1}]
