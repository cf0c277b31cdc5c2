"""The tensors of a delta's file: ``effects/<module path>/<part>`` and ``state/<name>``."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from editing.deltas.effect import Effect
from editing.deltas.gate import Gate
from editing.deltas.sparse import Sparse
from registry.errors import ArtifactCorrupt

EFFECTS, STATE = "effects", "state"

#: Every part's number of dimensions.
_PLAIN = {"scale": 1, "shift": 1, "A": 2, "B": 2, "dense": 2}
_SPARSE = {"starts": 1, "columns": 1, "values": 1}
_GATE = {"keys": 2, "bias": 1, "values": 2, "weight": 1, "offset": 1}
_INTEGERS = ("starts", "columns")
_GATED = re.compile(r"gates\.(0|[1-9][0-9]{0,2})\.(\w+)")


def tensors_of(module: str, effect: Effect) -> dict[str, Tensor]:
    """An effect's tensors as they are stored, by their names in the file."""
    return {f"{EFFECTS}/{module}/{part}": stored(tensor) for part, tensor in effect.parts().items()}


def stored(tensor: Tensor) -> Tensor:
    kept = tensor.detach().contiguous().cpu()
    return kept.float() if kept.is_floating_point() else kept.int()


def form_of(module: str, effect: Effect) -> dict[str, object]:
    """What the tensors do not say of an effect.

    Raises:
        ValueError: it goes on after a gate that replaces; one step has no such effect.
    """
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


def split(names: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The parts of each module, and the names of the state.

    Raises:
        ArtifactCorrupt: a name is neither.
    """
    parts: defaultdict[str, list[str]] = defaultdict(list)
    state = []
    for name in names:
        prefix, _, path = name.partition("/")
        module, _, part = path.rpartition("/")
        if prefix == STATE:
            state.append(path)
        elif prefix == EFFECTS and module:
            parts[module].append(part)
        else:
            raise ArtifactCorrupt(f"delta file: unknown tensor {name!r}")
    return dict(parts), state


def check_part(name: str, part: str, tensor: Tensor) -> None:
    """Check a part's name, dtype, number of dimensions and that it is finite.

    Raises:
        ArtifactCorrupt
    """
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
    check_finite(name, tensor)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises ArtifactCorrupt if a number is not finite."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ArtifactCorrupt(f"delta file: {name!r} holds a number that is not finite")


def forms_of(
    about: Mapping[str, object], modules: Mapping[str, object]
) -> dict[str, dict[str, object]]:
    """The forms in a header by module; a module that has none there has an empty one.

    Raises:
        ArtifactCorrupt: they are no table, or of modules without tensors.
    """
    forms = about.get("forms", {})
    if not isinstance(forms, dict) or not all(isinstance(form, dict) for form in forms.values()):
        raise ArtifactCorrupt("delta file: its forms are no table of modules")
    if unknown := forms.keys() - modules.keys():
        raise ArtifactCorrupt(
            f"delta file: it has forms of modules that it has no tensors for: {sorted(unknown)}"
        )
    return {module: forms.get(module, {}) for module in modules}


def effect_of(parts: Mapping[str, Tensor], form: Mapping[str, object]) -> Effect:
    """An effect of its parts by name (each checked) and its form.

    Raises:
        ArtifactCorrupt: they do not belong together.
    """
    try:
        return _effect(parts, form)
    except (ValueError, TypeError) as error:
        raise ArtifactCorrupt(f"delta file: {error}") from error


def _effect(parts: Mapping[str, Tensor], form: Mapping[str, object]) -> Effect:
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
