"""A delta file that is not exactly a delta is refused before a number of it is used."""

import json
import pickle
import struct
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save

from editing.deltas import Delta, Effect
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
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(name: str) -> None:
    with pytest.raises(ArtifactCorrupt, match="delta file"):
        Delta.from_bytes(HOSTILE[name]())


def test_a_good_one_is_not() -> None:
    assert Delta.from_bytes(good()).effects
