"""A delta: what one step changes, as one safetensors file named by its digest.

Tensors are named ``effects/<module path>/<part>`` (the names of ``Effect.parts``) and
``state/<name>`` (what later steps of the same method need, unused at inference). The file's
metadata holds the format, the base's digest, the method and, by module, what tensors cannot say of
its effect (``forms``: a sparse part's width, a gate's activation). Equal deltas have equal bytes.
"""

from __future__ import annotations

import json
import re
import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from editing.deltas.effect import Effect, compose
from editing.deltas.gate import Gate
from editing.deltas.sparse import Sparse
from registry.errors import ArtifactCorrupt
from registry.manifests import canonical_json

FORMAT = "errata-delta-1"
_KEY = "errata"  # one entry: the library writes several in no fixed order, and digests would differ

#: Every part's number of dimensions.
_PLAIN = {"scale": 1, "shift": 1, "A": 2, "B": 2, "dense": 2}
_SPARSE = {"starts": 1, "columns": 1, "values": 1}
_GATE = {"keys": 2, "bias": 1, "values": 2, "weight": 1, "offset": 1}
_INTEGERS = ("starts", "columns")
_GATED = re.compile(r"gates\.(0|[1-9][0-9]{0,2})\.(\w+)")


@dataclass(frozen=True)
class Delta:
    """Effects by module path, the method that made them, and the method's state."""

    effects: Mapping[str, Effect]
    base_digest: str
    method: str
    state: Mapping[str, Tensor] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The file.

        Raises:
            ValueError: an effect goes on after a gate that replaces; one step has no such effect.
        """
        tensors = {
            f"effects/{module}/{part}": tensor.detach().contiguous().cpu()
            for module, effect in self.effects.items()
            for part, tensor in effect.map(_stored).parts().items()
        }
        tensors |= {
            f"state/{name}": t.detach().contiguous().cpu() for name, t in self.state.items()
        }
        about: dict[str, object] = {
            "format": FORMAT,
            "base_digest": self.base_digest,
            "method": self.method,
        }
        forms = {module: _form(module, effect) for module, effect in self.effects.items()}
        if any(forms.values()):
            about["forms"] = {module: form for module, form in forms.items() if form}
        return save_tensors(_apart(tensors), metadata={_KEY: canonical_json(about).decode()})

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
        parts: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
        state: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            _check_finite(name, tensor)
            if name.startswith("state/"):
                state[name.removeprefix("state/")] = tensor
                continue
            prefix, _, path = name.partition("/")
            module, _, part = path.rpartition("/")
            if prefix != "effects" or not module:
                raise ArtifactCorrupt(f"delta file: unknown tensor {name!r}")
            _check_part(name, part, tensor)
            parts[module][part] = tensor
        try:
            forms = _forms(about, parts)
            effects = {module: _effect(named, forms[module]) for module, named in parts.items()}
        except (ValueError, TypeError) as error:
            raise ArtifactCorrupt(f"delta file: {error}") from error
        return cls(effects, str(about.get("base_digest")), str(about.get("method")), state)


def joined(deltas: Sequence[Delta]) -> Delta:
    """One delta that does what a method's deltas do one after the other.

    State of one name is concatenated along its last dimension, where each column is of one edit.

    Raises:
        ValueError: they are of different bases or methods, or there are none.
    """
    if len({delta.method for delta in deltas}) != 1:
        raise ValueError("deltas are joined that were made by one method")
    return deltas[0] if len(deltas) == 1 else flattened(deltas, deltas[0].method)


def flattened(deltas: Sequence[Delta], method: str = "flatten") -> Delta:
    """One delta that does what a stack does, of whatever methods; state as ``joined`` keeps it.

    Raises:
        ValueError: they are of different bases, or there are none.
    """
    if len({delta.base_digest for delta in deltas}) != 1:
        raise ValueError("deltas are put together that were made on one base")
    names = dict.fromkeys(name for delta in deltas for name in delta.state)
    state = {
        name: torch.cat([d.state[name] for d in deltas if name in d.state], dim=-1)
        for name in names
    }
    effects = compose(delta.effects for delta in deltas)
    return Delta(effects, deltas[0].base_digest, method, state)


def _stored(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor.int()


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which no two share memory, which the format refuses."""
    apart: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return apart


def _form(module: str, effect: Effect) -> dict[str, object]:
    """What the tensors do not say of an effect."""
    if effect.later is not None:
        raise ValueError(
            f"{module!r}: its effect goes on after a gate that replaces the output; save each step"
            " as a delta of its own"
        )
    form: dict[str, object] = {}
    if effect.sparse is not None:
        form["in_features"] = effect.sparse.in_features
    if effect.gates:
        form["gates"] = [
            {"activation": gate.activation, "normalise": gate.normalise} for gate in effect.gates
        ]
    return form


def _check_part(name: str, part: str, tensor: Tensor) -> None:
    """Check a part's name, dtype and number of dimensions."""
    last = part.rpartition(".")[2]
    if part.startswith("sparse."):
        dimensions = _SPARSE.get(part.removeprefix("sparse."))
    elif match := _GATED.fullmatch(part):
        dimensions = _GATE.get(match[2])
    else:
        dimensions = _PLAIN.get(part)
    if dimensions is None:
        raise ArtifactCorrupt(f"delta file: unknown tensor {name!r}")
    dtype = torch.int32 if last in _INTEGERS else torch.float32
    if tensor.dtype != dtype or tensor.dim() != dimensions:
        raise ArtifactCorrupt(
            f"delta file: {name!r} is {tensor.dtype} with shape {tuple(tensor.shape)},"
            f" expected {dtype} with {dimensions} dimension(s)"
        )


def _forms(
    about: Mapping[str, object], parts: Mapping[str, object]
) -> dict[str, dict[str, object]]:
    """The forms in a header by module; a module of no parts has none."""
    forms = about.get("forms", {})
    if not isinstance(forms, dict) or not all(isinstance(form, dict) for form in forms.values()):
        raise ValueError("its forms are no table of modules")
    if unknown := forms.keys() - parts.keys():
        raise ValueError(f"it has forms of modules that it has no tensors for: {sorted(unknown)}")
    return {module: forms.get(module, {}) for module in parts}


def _effect(parts: Mapping[str, Tensor], form: Mapping[str, object]) -> Effect:
    """An effect of its parts by name (each checked) and its form.

    Raises:
        ValueError: they do not belong together.
        TypeError: a part or an entry of the form lacks or is unknown.
    """
    plain: dict[str, Any] = {}
    own: defaultdict[str, dict[str, Any]] = defaultdict(dict)  # "sparse", "gates.0", …
    for part, tensor in parts.items():
        owner, _, name = part.rpartition(".")
        (own[owner] if owner else plain)[name] = tensor
    entries = form.get("gates", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("the gates in its forms are no list")
    width = form.get("in_features")
    expected = {f"gates.{place}" for place in range(len(entries))}
    expected |= set() if width is None else {"sparse"}
    if form.keys() - {"gates", "in_features"} or own.keys() != expected:
        raise ValueError(f"it has the parts {sorted(own)}, its forms tell of {sorted(expected)}")
    sparse = None
    if width is not None:
        if type(width) is not int or not 0 < width < 2**31:
            raise ValueError(f"in_features is {width!r}")
        sparse = Sparse(**own["sparse"], in_features=width)
    gates = tuple(_gate(own[f"gates.{i}"], entry) for i, entry in enumerate(entries))
    return Effect(**plain, sparse=sparse, gates=gates)


def _gate(tensors: Mapping[str, Any], entry: Mapping[str, object]) -> Gate:
    activation, normalise = entry.get("activation"), entry.get("normalise")
    if entry.keys() != {"activation", "normalise"} or not isinstance(normalise, bool):
        raise ValueError(f"a gate's form is {dict(entry)}; it has activation and normalise")
    return Gate(**tensors, activation=str(activation), normalise=normalise)


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
