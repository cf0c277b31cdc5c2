"""Rows of a long bench, kept as they are measured: a run that was broken off goes on from them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from registry.errors import InvalidRequest
from registry.manifests import canonical_json, sha256

ROOT = Path(__file__).resolve().parents[1]
#: The packages whose source rows depend on.
PACKAGES = ("benchmarks", "editing")

Row = dict[str, Any]


class Kept:
    """A file of JSON lines, a row each, that begins with what the rows depend on.

    Args:
        file: None keeps nothing.
        about: the settings behind the rows. Source code and torch's version are looked at anyway.

    Raises:
        InvalidRequest: the file is of other settings or other code.
    """

    def __init__(self, file: Path | None, **about: Any) -> None:
        self._file = file
        self._about = {**about, "source": _source(), "torch": torch.__version__}
        self.rows: list[Row] = []
        if file is None:
            return
        if not file.exists():
            self._write(self._about)
            return
        about, *self.rows = map(json.loads, file.read_text().splitlines())
        if about != json.loads(canonical_json(self._about)):
            raise InvalidRequest(
                f"{file} holds rows of other code or other settings; name a new file, or delete it"
            )

    def add(self, row: Row) -> None:
        """Keep one more row; it is on the disk when this returns."""
        self.rows.append(row)
        if self._file is not None:
            self._write(row)

    def _write(self, line: Row) -> None:
        if self._file is not None:
            with self._file.open("ab") as stream:
                stream.write(canonical_json(line) + b"\n")


def _source(packages: Iterable[str] = PACKAGES) -> str:
    """The digest of the packages' modules."""
    files = sorted(path for name in packages for path in (ROOT / name).rglob("*.py"))
    found = {str(path.relative_to(ROOT)): sha256(path.read_bytes()) for path in files}
    return sha256(canonical_json(found))
