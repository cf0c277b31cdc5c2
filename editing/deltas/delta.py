"""A delta: what one step changes, as one safetensors file named by its digest.

Tensors are named ``effects/<module path>/<part>`` (the names of ``Effect.parts``) and
``state/<name>`` (what later steps of the same method need, unused at inference). The file's
metadata holds the format, the base's digest, the method and, by module, what tensors cannot say of
its effect (``forms``: a sparse part's width, a gate's activation). Equal deltas have equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from editing.deltas.effect import Effect, compose
from editing.deltas.file import DeltaWriter
from editing.deltas.parts import (
    EFFECTS,
    STATE,
    check_finite,
    check_part,
    effect_of,
    forms_of,
    split,
)
from editing.headers import read_header
from registry.errors import ArtifactCorrupt


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
        writer = DeltaWriter(BytesIO(), self.base_digest, self.method)
        for module, effect in self.effects.items():
            writer.add(module, effect)
        for name, tensor in self.state.items():
            writer.add_state(name, tensor)
        return b"".join(writer.chunks())

    @classmethod
    def from_bytes(cls, data: bytes) -> Delta:
        """Read and check a delta.

        Raises:
            ArtifactCorrupt: the bytes are no delta, a tensor's name, dtype or shape is not of
                the format, or a number is not finite.
        """
        header = read_header(BytesIO(data), len(data))
        try:
            tensors = load_tensors(data)
        except SafetensorError as error:
            raise ArtifactCorrupt(f"delta file: not readable as safetensors: {error}") from error
        parts, state = split(tensors)
        forms = forms_of(header.about, parts)
        effects = {}
        for module, own in parts.items():
            named = {part: tensors[f"{EFFECTS}/{module}/{part}"] for part in own}
            for part, tensor in named.items():
                check_part(f"{EFFECTS}/{module}/{part}", part, tensor)
            effects[module] = effect_of(named, forms[module])
        kept = {name: tensors[f"{STATE}/{name}"] for name in state}
        for name, tensor in kept.items():
            check_finite(f"{STATE}/{name}", tensor)
        about = header.about
        return cls(effects, str(about.get("base_digest")), str(about.get("method")), kept)


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
