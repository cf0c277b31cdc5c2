"""What delta files hold, read from their headers and in pieces, without torch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import BufferedReader
from typing import Any

import numpy as np
from numpy.typing import NDArray

from editing.headers import read_header
from registry.artifacts import ArtifactStore

#: Numbers of a large part that are in memory at once.
PIECE = 2**22
Array = NDArray[Any]


@dataclass(frozen=True)
class Touched:
    """What a delta does to one module.

    Attributes:
        kinds: of ``scale``, ``shift``, ``low_rank``, ``dense``, ``sparse`` and ``gated``.
        rank: of the low-rank part; 0 without one.
        shape: [out, in]; None where the file does not say it.
        norm: ‖B A + D‖_F; None where the effect has neither.
        replaces: whether a gate of it replaces the module's output.
    """

    module: str
    kinds: tuple[str, ...]
    rank: int
    shape: tuple[int | None, int | None]
    norm: float | None
    replaces: bool


@dataclass(frozen=True)
class Contents:
    method: str
    modules: tuple[Touched, ...]


@lru_cache(maxsize=1024)  # artifacts never change
def read_contents(store: ArtifactStore, digest: str) -> Contents:
    """What a delta's file holds.

    Raises:
        NotFound: it is not in the store.
        ArtifactCorrupt: it is no delta.
    """
    with store.opened(digest) as stream:
        file = _File(stream)
        modules = tuple(_touched(file, module, parts) for module, parts in file.modules().items())
    return Contents(str(file.about["method"]), modules)


class _File:
    """A safetensors file whose parts are read when they are asked for."""

    def __init__(self, stream: BufferedReader) -> None:
        self._stream = stream
        header = read_header(stream, os.fstat(stream.fileno()).st_size)
        self.about, self._tensors = header.about, header.tensors
        self._start = stream.tell()

    def modules(self) -> dict[str, dict[str, str]]:
        """By module, its parts' names with the tensors' names."""
        found: dict[str, dict[str, str]] = {}
        for name in sorted(self._tensors):
            prefix, _, path = name.partition("/")
            module, _, part = path.rpartition("/")
            if prefix == "effects":
                found.setdefault(module, {})[part] = name
        return found

    def form(self, module: str) -> Mapping[str, Any]:
        form: Mapping[str, Any] = self.about.get("forms", {}).get(module, {})
        return form

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name]["shape"])

    def whole(self, name: str) -> Array:
        blocks = [*self.rows(name)]
        return np.concatenate(blocks) if blocks else np.zeros(self.shape(name))

    def rows(self, name: str) -> Iterator[Array]:
        """A tensor's rows in blocks of about ``PIECE`` numbers, in fp64 or as integers."""
        entry = self._tensors[name]
        count, *rest = entry["shape"]
        width = math.prod(rest)
        kind = np.dtype("<i4" if entry["dtype"] == "I32" else "<f4")
        step = max(1, PIECE // max(1, width))
        for start in range(0, count, step):
            size = min(step, count - start)
            self._stream.seek(
                self._start + entry["data_offsets"][0] + start * width * kind.itemsize
            )
            block = np.frombuffer(self._stream.read(size * width * kind.itemsize), kind)
            block = block.reshape(size, *rest)
            yield block if kind.kind == "i" else block.astype(np.float64)


def _touched(file: _File, module: str, parts: Mapping[str, str]) -> Touched:
    form = file.form(module)
    gates = form.get("gates", [])
    kinds = [name for name in ("scale", "shift") if name in parts]
    kinds += ["low_rank"] if "A" in parts else []
    kinds += ["dense"] if "dense" in parts else []
    kinds += ["sparse"] if "sparse.values" in parts else []
    kinds += ["gated"] if gates else []
    return Touched(
        module,
        tuple(kinds),
        rank=file.shape(parts["A"])[0] if "A" in parts else 0,
        shape=_shape(file, parts, form),
        norm=_norm(file, parts),
        replaces=any(gate["activation"] == "nearest" for gate in gates),
    )


def _shape(
    file: _File, parts: Mapping[str, str], form: Mapping[str, Any]
) -> tuple[int | None, int | None]:
    out: int | None = None
    inputs: int | None = form.get("in_features")
    for part, name in parts.items():
        shape = file.shape(name)
        last = part.rpartition(".")[2]
        if part in ("scale", "shift", "B", "dense"):
            out = shape[0]
        elif part == "sparse.starts":
            out = shape[0] - 1
        elif part.startswith("gates.") and last == "values":
            out = shape[1]
        if part in ("A", "dense") or (part.startswith("gates.") and last == "keys"):
            inputs = shape[1]
    return out, inputs


def _norm(file: _File, parts: Mapping[str, str]) -> float | None:
    """‖B A + D‖_F, of which neither is formed: ‖B A‖² = ⟨BᵀB, A Aᵀ⟩, and D is read by pieces."""
    A, B = (file.whole(parts[name]) if name in parts else None for name in ("A", "B"))
    if A is None and "dense" not in parts and "sparse.values" not in parts:
        return None
    total = 0.0 if A is None or B is None else float(((B.T @ B) * (A @ A.T)).sum())
    if "dense" in parts:
        row = 0
        for D in file.rows(parts["dense"]):
            total += float((D * D).sum())
            if A is not None and B is not None:
                total += 2 * float(((D @ A.T) * B[row : row + len(D)]).sum())
            row += len(D)
    elif "sparse.values" in parts:
        values = file.whole(parts["sparse.values"])
        total += float((values * values).sum())
        if A is not None and B is not None:
            columns, starts = (file.whole(parts[f"sparse.{n}"]) for n in ("columns", "starts"))
            rows = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
            for rank in range(len(A)):
                total += 2 * float((values * B[rows, rank] * A[rank, columns]).sum())
    return math.sqrt(max(total, 0.0))
