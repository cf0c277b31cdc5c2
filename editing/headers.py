"""What the header of a delta's file says, read without torch and without its numbers."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from registry.errors import ArtifactCorrupt

FORMAT = "errata-delta-1"
#: Far more than the names of any model's tensors take.
HEADER_BYTES = 2**24
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
KEY = "errata"  # one entry: the library writes several in no fixed order, and digests would differ


@dataclass(frozen=True)
class Header:
    """Attributes:
    about: the delta's own entry: format, base, method, forms.
    tensors: by name, dtype, shape and place, as safetensors has them.
    """

    about: Mapping[str, Any]
    tensors: Mapping[str, Any]

    @property
    def gated(self) -> list[str]:
        """The modules with gates."""
        forms = self.about.get("forms")
        if not isinstance(forms, dict):
            return []
        return sorted(m for m, form in forms.items() if isinstance(form, dict) and "gates" in form)


def read_header(stream: BinaryIO, size: int) -> Header:
    """The header of a delta's file of ``size`` bytes. A name that occurs twice is refused: the
    library would take the last.

    Raises:
        ArtifactCorrupt: the file is no delta of this format.
    """
    try:
        header = read_tensors(stream, size)
        about = json.loads(header.pop("__metadata__")[KEY])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactCorrupt(f"delta file: its header says nothing of a delta: {error}") from error
    about = about if isinstance(about, dict) else {}
    if about.get("format") != FORMAT:
        raise ArtifactCorrupt(f"delta file: format is {about.get('format')!r}, expected {FORMAT!r}")
    return Header(about, header)


def read_tensors(stream: BinaryIO, size: int) -> dict[str, Any]:
    """The header of a safetensors file of ``size`` bytes, all tensors of dtypes that are read.

    Raises:
        ValueError: it is none, too long, names a tensor twice, or has one of another dtype: of
            some that the library knows torch has none.
    """
    start = stream.read(8)
    if len(start) < 8:
        raise ValueError("the file is shorter than a safetensors header")
    (length,) = struct.unpack("<Q", start)
    if length > min(size - 8, HEADER_BYTES):
        raise ValueError(f"the header is longer than the file, or than {HEADER_BYTES} bytes")
    try:
        header = json.loads(stream.read(length), object_pairs_hook=without_duplicates)
    except RecursionError:
        raise ValueError("the header is nested too deeply") from None
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    for name, tensor in header.items():
        dtype = tensor.get("dtype") if isinstance(tensor, dict) else None
        if name != "__metadata__" and dtype not in DTYPES:
            raise ValueError(f"tensor {name[:200]!r} has dtype {dtype!r:.40}")
    return header


def without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of JSON. Raises ValueError: a name occurs twice, of which others take another."""
    seen = dict(pairs)
    if len(seen) != len(pairs):
        raise ValueError("a name occurs twice")
    return seen
