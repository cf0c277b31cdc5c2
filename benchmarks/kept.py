"""Rows of a long bench, kept as they are measured: a run that was broken off goes on from them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from registry.errors import InvalidRequest
from registry.manifests import canonical_json, sha256

ROOT = Path(__file__).resolve().parents[1]

Row = dict[str, Any]


class Kept:
    """A file of JSON lines, a row each, that begins with what the rows depend on.

    Args:
        file: None keeps nothing.
        packages: the folders whose modules the rows depend on.
        about: the settings behind the rows. Torch's version is looked at anyway.

    Raises:
        InvalidRequest: the file is of other settings or other code.
    """

    def __init__(self, file: Path | None, packages: Iterable[str], **about: Any) -> None:
        self._file = file
        about |= {"source": _source(packages), "torch": torch.__version__}
        self.rows: list[Row] = []
        if file is None:
            return
        depends = json.loads(canonical_json(about))
        first, *self.rows = found = _lines(file) or [depends]
        if first != depends:
            raise InvalidRequest(
                f"{file} holds rows of other code or other settings; name a new file, or delete it"
            )
        beside = file.with_name(f"{file.name}.new")
        with beside.open("wb") as stream:
            _sync(stream, found)
        os.replace(beside, file)

    def add(self, row: Row) -> None:
        """Keep one more row; it is on the disk when this returns."""
        self.rows.append(row)
        if self._file is not None:
            with self._file.open("ab") as stream:
                _sync(stream, [row])


def _sync(stream: BinaryIO, lines: Iterable[Row]) -> None:
    stream.writelines(canonical_json(line) + b"\n" for line in lines)
    stream.flush()
    os.fsync(stream.fileno())


def _lines(file: Path) -> list[Row]:
    """What a file holds, less a last line that a kill has cut off."""
    data = file.read_bytes() if file.exists() else b""
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def _source(packages: Iterable[str]) -> str:
    """The digest of the packages' modules."""
    files = sorted(path for name in packages for path in (ROOT / name).rglob("*.py"))
    found = {str(path.relative_to(ROOT)): sha256(path.read_bytes()) for path in files}
    return sha256(canonical_json(found))
