"""A delta's file, module by module: read without the rest, written without the whole in memory."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from editing.deltas.effect import Effect
from editing.deltas.parts import (
    EFFECTS,
    STATE,
    check_finite,
    check_part,
    effect_of,
    form_of,
    forms_of,
    split,
    stored,
    tensors_of,
)
from editing.headers import FORMAT, KEY, read_header
from registry.errors import ArtifactCorrupt
from registry.manifests import canonical_json

CHUNK_BYTES = 2**20
#: The dtypes of a delta's tensors by safetensors' names, in the order of their places in a file.
_DTYPES = {torch.float32: "F32", torch.int32: "I32"}


class DeltaFile:
    """A delta on disk. Its modules' names are known, their numbers read when they are asked for.

    Raises:
        ArtifactCorrupt: as ``Delta.from_bytes``; of numbers and shapes once they are read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as stream:
            header = read_header(stream, path.stat().st_size)
        self.base_digest = str(header.about.get("base_digest"))
        self.method = str(header.about.get("method"))
        self.parts, self.state_names = split(header.tensors)
        self._forms = forms_of(header.about, self.parts)
        self._tensors(())  # the library checks where they lie

    def effect(self, module: str) -> Effect | None:
        """A module's effect; None where the delta has none."""
        if module not in self.parts:
            return None
        names = {part: f"{EFFECTS}/{module}/{part}" for part in self.parts[module]}
        tensors = self._tensors(names.values())
        for part, name in names.items():
            check_part(name, part, tensors[name])
        parts = {part: tensors[name] for part, name in names.items()}
        return effect_of(parts, self._forms[module])

    def state(self) -> dict[str, Tensor]:
        tensors = self._tensors(f"{STATE}/{name}" for name in self.state_names)
        for name, tensor in tensors.items():
            check_finite(name, tensor)
        return {name.removeprefix(f"{STATE}/"): tensor for name, tensor in tensors.items()}

    def _tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        try:
            with safe_open(self.path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ArtifactCorrupt(f"delta file: not readable as safetensors: {error}") from error


class DeltaWriter:
    """Writes a delta of which one module is in memory at a time.

    Its file begins with the shapes of all tensors and holds them sorted by name, so that their
    numbers wait in a scratch file until the last of them is there.
    """

    def __init__(self, scratch: BinaryIO, base_digest: str, method: str) -> None:
        self._scratch = scratch
        self._about = {"format": FORMAT, "base_digest": base_digest, "method": method}
        self._forms: dict[str, dict[str, object]] = {}
        self._places: dict[str, int] = {}
        self._shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}

    def add(self, module: str, effect: Effect) -> None:
        """Raises ValueError: the effect goes on after a gate that replaces."""
        if form := form_of(module, effect):
            self._forms[module] = form
        self._keep(tensors_of(module, effect))

    def add_state(self, name: str, tensor: Tensor) -> None:
        self._keep({f"{STATE}/{name}": stored(tensor)})

    def chunks(self) -> Iterator[bytes]:
        """The file."""
        about = self._about | ({"forms": self._forms} if self._forms else {})
        header, names = _layout(self._shapes, about)
        yield header
        for name in names:
            self._scratch.seek(self._places[name])
            left = _nbytes(*self._shapes[name])
            while left:
                chunk = self._scratch.read(min(left, CHUNK_BYTES))
                left -= len(chunk)
                yield chunk

    def _keep(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._places[name] = self._scratch.seek(0, 2)
            self._shapes[name] = tensor.dtype, tuple(tensor.shape)
            self._scratch.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _layout(
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], about: Mapping[str, object]
) -> tuple[bytes, list[str]]:
    """The header of a file and the order of its tensors, to the byte as safetensors writes them."""
    order = list(_DTYPES)
    names = sorted(shapes, key=lambda name: (order.index(shapes[name][0]), name.encode()))
    header: dict[str, object] = {"__metadata__": {KEY: canonical_json(about).decode()}}
    end = 0
    for name in names:
        dtype, shape = shapes[name]
        start, end = end, end + _nbytes(dtype, shape)
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, names


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    count = dtype.itemsize
    for length in shape:
        count *= length
    return count
