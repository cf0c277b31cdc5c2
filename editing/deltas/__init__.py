"""Deltas: one module's effect, the file that holds a step's effects, and how stacks compose."""

from editing.deltas.delta import Delta, flattened, joined
from editing.deltas.effect import Effect, compose
from editing.deltas.file import DeltaFile, DeltaWriter
from editing.deltas.gate import Gate
from editing.deltas.sparse import Sparse

__all__ = [
    "Delta",
    "DeltaFile",
    "DeltaWriter",
    "Effect",
    "Gate",
    "Sparse",
    "compose",
    "flattened",
    "joined",
]
