"""A delta file that is not exactly a delta is refused before a number of it is used."""

import json
import pickle
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from editing.deltas import Delta, DeltaFile, Effect
from registry.errors import ArtifactCorrupt

PATH = "effects/model.layers.0.mlp.down_proj"
ABOUT = {"format": "errata-delta-1", "base_digest": "b", "method": "rome"}
META = {"errata": json.dumps(ABOUT)}


def good() -> bytes:
    effect = Effect(A=torch.ones(1, 3), B=torch.ones(2, 1))
    return Delta({"model.layers.0.mlp.down_proj": effect}, "b", "rome").to_bytes()


def doubled_name() -> bytes:
    """Two entries of one name: the library would silently take the last."""
    entry = json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
    name = json.dumps(f"{PATH}/shift")
    header = f'{{"__metadata__":{json.dumps(META)},{name}:{entry},{name}:{entry}}}'.encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * 4


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def ones(count: int) -> Tensor:
    return torch.ones(count)


def about(**form: object) -> dict[str, str]:
    forms = {PATH.removeprefix("effects/"): form}
    return {"errata": json.dumps({**ABOUT, "forms": forms})}


def sparse(dense: Tensor | None = None, in_features: object = 3, **changed: Tensor) -> bytes:
    tensors = {"starts": ints(0, 1, 2), "columns": ints(0, 2), "values": ones(2), **changed}
    named = {f"{PATH}/sparse.{name}": tensor for name, tensor in tensors.items()}
    if dense is not None:
        named[f"{PATH}/dense"] = dense
    return save(named, META if in_features is None else about(in_features=in_features))


RELU = {"activation": "relu", "normalise": False}
GATE = {"keys": torch.ones(2, 3), "bias": ones(2), "values": torch.ones(2, 2)}


def gated(form: object = RELU, **changed: Tensor | None) -> bytes:
    tensors = {**GATE, **changed}
    named = {f"{PATH}/gates.0.{name}": t for name, t in tensors.items() if t is not None}
    return save(named, META if form is None else about(gates=[form]))


HOSTILE: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "pickle": lambda: pickle.dumps({"A": 1}),
    "huge header": lambda: struct.pack("<Q", 2**62) + b"{}",
    "truncated": lambda: good()[:-1],
    "no metadata": lambda: save({f"{PATH}/shift": torch.ones(2)}),
    "metadata of another kind": lambda: save({f"{PATH}/shift": torch.ones(2)}, {"errata": "[]"}),
    "another format": lambda: save(
        {f"{PATH}/shift": torch.ones(2)}, {"errata": json.dumps({**ABOUT, "format": "x"})}
    ),
    "not finite": lambda: save({f"{PATH}/shift": torch.tensor([1.0, float("nan")])}, META),
    "infinite": lambda: save({f"{PATH}/shift": torch.tensor([float("inf")])}, META),
    "unknown part": lambda: save({f"{PATH}/code": torch.ones(2)}, META),
    "unknown tensor": lambda: save({"weights": torch.ones(2)}, META),
    "half of a low-rank pair": lambda: save({f"{PATH}/A": torch.ones(1, 3)}, META),
    "ranks that differ": lambda: save(
        {f"{PATH}/A": torch.ones(1, 3), f"{PATH}/B": torch.ones(2, 2)}, META
    ),
    "wrong dimension": lambda: save({f"{PATH}/shift": torch.ones(2, 2)}, META),
    "wrong dtype": lambda: save({f"{PATH}/shift": torch.ones(2, dtype=torch.int64)}, META),
    "a name twice": doubled_name,
    **{
        f"sparse, {what}": partial(sparse, **change)
        for what, change in {
            "floats as places": {"starts": torch.tensor([0.0, 1.0, 2.0])},
            "a start that falls": {"starts": ints(0, 3, 2)},
            "a start that wraps": {"starts": ints(0, 2**31 - 1, -2, 2)},
            "a start past the end": {"starts": ints(0, 1, 3)},
            "a first start that is not 0": {"starts": ints(1, 1, 2)},
            "no starts": {"starts": ints()},
            "a column past the end": {"columns": ints(0, 3)},
            "a negative column": {"columns": ints(-1, 2)},
            "a column twice": {"starts": ints(0, 2, 2), "columns": ints(1, 1)},
            "fewer columns than values": {"columns": ints(1)},
            "a width that is none": {"in_features": True},
            "a width below 1": {"in_features": 0},
            "a huge width": {"in_features": 2**40},
            "no width": {"in_features": None},
            "a value that is not finite": {"values": torch.tensor([1.0, float("inf")])},
        }.items()
    },
    **{
        f"gate, {what}": partial(gated, **change)
        for what, change in {
            "no keys": {"keys": None},
            "of no key": {"keys": torch.ones(0, 3), "bias": ones(0), "values": torch.ones(0, 2)},
            "values of another count": {"values": torch.ones(1, 2)},
            "weight of another width": {"weight": ones(4)},
            "an unknown part": {"code": ones(1)},
            "flat keys": {"keys": ones(2)},
            "an unknown activation": {"form": {"activation": "__import__", "normalise": True}},
            "an activation that is no text": {"form": {"activation": ["relu"], "normalise": True}},
            "a normalise that is no truth": {"form": {"activation": "relu", "normalise": 1}},
            "a form of too much": {"form": {**RELU, "code": 1}},
            "a form that is no table": {"form": 3},
            "no form": {"form": None},
        }.items()
    },
    "a gate that replaces before another": lambda: save(
        {f"{PATH}/gates.{i}.{name}": t.clone() for i in range(2) for name, t in GATE.items()},
        about(gates=[{**RELU, "activation": "nearest"}, RELU]),
    ),
    "gates whose numbers have a gap": lambda: save(
        {f"{PATH}/gates.1.{name}": t for name, t in GATE.items()}, about(gates=[RELU])
    ),
    "forms of a module without tensors": lambda: save({}, about(gates=[RELU])),
    "forms that are no table": lambda: save({}, {"errata": json.dumps({**ABOUT, "forms": [1]})}),
    "dense and sparse at once": partial(sparse, dense=torch.ones(2, 3)),
    "what follows a gate": lambda: save({f"{PATH}/later.1.shift": torch.ones(2)}, META),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(name: str) -> None:
    with pytest.raises(ArtifactCorrupt, match="delta file"):
        Delta.from_bytes(HOSTILE[name]())


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused_when_it_is_read_module_by_module(name: str, tmp_path: Path) -> None:
    file = tmp_path / "delta"
    file.write_bytes(HOSTILE[name]())
    with pytest.raises(ArtifactCorrupt, match="delta file"):
        read_all(file)


def read_all(file: Path) -> dict[str, Effect | None]:
    delta = DeltaFile(file)
    delta.state()
    return {module: delta.effect(module) for module in delta.parts}


def test_a_good_one_is_not(tmp_path: Path) -> None:
    for data in (good(), sparse(), gated(), gated(weight=ones(3), offset=ones(3))):
        assert Delta.from_bytes(data).effects
        (tmp_path / "delta").write_bytes(data)
        assert read_all(tmp_path / "delta").keys() == Delta.from_bytes(data).effects.keys()
