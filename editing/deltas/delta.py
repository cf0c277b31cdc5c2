"""A delta: what one step changes, as one safetensors file named by its digest.

Tensors are named ``effects/<module path>/<part>`` (parts of ``Effect``) and ``state/<name>`` (what
later steps of the same method need, unused at inference). The file's metadata
holds the format, the base's digest and the method. Equal deltas have equal bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from editing.deltas.effect import Effect
from registry.errors import ArtifactCorrupt
from registry.manifests import canonical_json

FORMAT = "errata-delta-1"
_KEY = "errata"  # one entry: the library writes several in no fixed order, and digests would differ
_PARTS = tuple(f.name for f in fields(Effect))
_DIMENSIONS = {"scale": 1, "shift": 1, "A": 2, "B": 2, "dense": 2}


@dataclass(frozen=True)
class Delta:
    """Effects by module path, the method that made them, and the method's state."""

    effects: Mapping[str, Effect]
    base_digest: str
    method: str
    state: Mapping[str, Tensor] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        tensors = {
            f"effects/{module}/{part}": tensor.detach().float().contiguous().cpu()
            for module, effect in self.effects.items()
            for part, tensor in effect.parts().items()
        }
        tensors |= {
            f"state/{name}": t.detach().contiguous().cpu() for name, t in self.state.items()
        }
        about = {"format": FORMAT, "base_digest": self.base_digest, "method": self.method}
        return save_tensors(tensors, metadata={_KEY: canonical_json(about).decode()})

    @classmethod
    def from_bytes(cls, data: bytes) -> Delta:
        """Read and check a delta.

        Raises:
            ArtifactCorrupt: the bytes are no delta, a tensor's name, dtype or shape is not of
                the format, or a number is not finite.
        """
        about = _about(data)
        if about.get("format") != FORMAT:
            raise ArtifactCorrupt(
                f"delta file: format is {about.get('format')!r}, expected {FORMAT!r}"
            )
        try:
            tensors = load_tensors(data)
        except SafetensorError as error:
            raise ArtifactCorrupt(f"delta file: not readable as safetensors: {error}") from error
        parts: dict[str, dict[str, Tensor]] = {}
        state: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            _check_finite(name, tensor)
            if name.startswith("state/"):
                state[name.removeprefix("state/")] = tensor
                continue
            prefix, _, path = name.partition("/")
            module, _, part = path.rpartition("/")
            if prefix != "effects" or not module or part not in _PARTS:
                raise ArtifactCorrupt(f"delta file: unknown tensor {name!r}")
            if tensor.dtype != torch.float32 or tensor.dim() != _DIMENSIONS[part]:
                raise ArtifactCorrupt(
                    f"delta file: {name!r} is {tensor.dtype} with shape {tuple(tensor.shape)},"
                    f" expected float32 with {_DIMENSIONS[part]} dimension(s)"
                )
            parts.setdefault(module, {})[part] = tensor
        try:
            effects = {module: Effect(**named) for module, named in parts.items()}
        except ValueError as error:
            raise ArtifactCorrupt(f"delta file: {error}") from error
        return cls(effects, str(about.get("base_digest")), str(about.get("method")), state)


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ArtifactCorrupt(f"delta file: {name!r} holds a number that is not finite")


def _about(data: bytes) -> dict[str, object]:
    """What the header says of the delta. A name that occurs twice is refused: the library would
    take the last."""
    if len(data) < 8:
        raise ArtifactCorrupt("delta file: shorter than a safetensors header")
    (length,) = struct.unpack("<Q", data[:8])
    if length > len(data) - 8:
        raise ArtifactCorrupt("delta file: the header is longer than the file")
    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_without_duplicates)
        about = json.loads(header["__metadata__"][_KEY])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactCorrupt(f"delta file: its header says nothing of a delta: {error}") from error
    return about if isinstance(about, dict) else {}


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    seen = dict(pairs)
    if len(seen) != len(pairs):
        raise ValueError("a name occurs twice")
    return seen
