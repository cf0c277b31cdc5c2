"""An adapter's weights that are not exactly an adapter's are refused before one of them is used."""

import json
import pickle
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save

from editing.exchange.config import read_config
from editing.exchange.peft import read_adapter
from editing.models import ModelView
from editing.models.loading import load_model, load_tokenizer
from registry.bases import find_bases
from registry.errors import UnprocessableRequest
from tests.security.attacks import tried

DOWN = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"
A, B = DOWN.format("A"), DOWN.format("B")
FORM = read_config(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}).encode())


@pytest.fixture(scope="module")
def view() -> ModelView:
    base = find_bases("atlas")["atlas"]
    return ModelView(load_model(base), load_tokenizer(base), base)


def sizes(view: ModelView) -> tuple[int, int]:
    out, width = view.weight("model.layers.0.mlp.down_proj").shape
    return out, width


def file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changed: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [1, 4], "data_offsets": [0, 16], **changed}


def doubled() -> bytes:
    told = json.dumps(entry())
    return file(f'{{"{A}": {told}, "{A}": {told}}}'.encode(), b"\0" * 16)


#: Of the safetensors format itself; {} stands for nothing of the base.
FORMAT: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "seven bytes": lambda: b"\0" * 7,
    "a pickle": lambda: pickle.dumps({A: 1}),
    "a torch file": lambda: b"PK\x03\x04" + b"\0" * 100,
    "a header longer than the file": lambda: file({A: entry()}, length=10**6),
    "a header of 2**62 bytes": lambda: file({}, length=2**62),
    "a header of 2**64 - 1 bytes": lambda: file({}, length=2**64 - 1),
    "a header of 17 MiB": lambda: file(b" " * (17 * 2**20) + b"{}"),
    "a header of nothing": lambda: file(b""),
    "a header that is no JSON": lambda: file(b"{a: 1}"),
    "a header that is a list": lambda: file([]),
    "a deep header": lambda: file(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "a header that is no UTF-8": lambda: file(b'{"\xff": 1}'),
    "half a surrogate pair": lambda: file(b'{"\\ud800": ' + json.dumps(entry()).encode() + b"}"),
    "a name twice": doubled,
    "a dtype twice": lambda: file(
        f'{{"{A}": {{"dtype": "F32", {json.dumps(entry())[1:]}}}'.encode(), b"\0" * 16
    ),
    "an entry that is no object": lambda: file({A: 7}),
    "no dtype": lambda: file({A: {"shape": [1, 4], "data_offsets": [0, 16]}}, b"\0" * 16),
    "an unknown dtype": lambda: file({A: entry(dtype="evil")}, b"\0" * 16),
    "a dtype that torch lacks": lambda: file({A: entry(dtype="F4", shape=[1, 32])}, b"\0" * 16),
    "another that it lacks": lambda: file({A: entry(dtype="F8_E8M0", shape=[1, 16])}, b"\0" * 16),
    "complex numbers": lambda: file({A: entry(dtype="C64", shape=[1, 2])}, b"\0" * 16),
    "a negative length": lambda: file({A: entry(shape=[-1, -4])}, b"\0" * 16),
    "a length of 2**63": lambda: file({A: entry(shape=[2**63, 1])}, b"\0" * 16),
    "lengths that overflow": lambda: file({A: entry(shape=[2**40, 2**40])}, b"\0" * 16),
    "a length that is no whole number": lambda: file({A: entry(shape=[1.5, 4])}, b"\0" * 16),
    "a shape that is text": lambda: file({A: entry(shape="1,4")}, b"\0" * 16),
    "offsets beyond the end": lambda: file({A: entry(data_offsets=[0, 1600])}, b"\0" * 16),
    "offsets backwards": lambda: file({A: entry(data_offsets=[16, 0])}, b"\0" * 16),
    "offsets below 0": lambda: file({A: entry(data_offsets=[-16, 0])}, b"\0" * 16),
    "offsets of 2**64": lambda: file({A: entry(data_offsets=[0, 2**64])}, b"\0" * 16),
    "tensors that overlap": lambda: file({A: entry(), B: entry()}, b"\0" * 16),
    "a hole between tensors": lambda: file(
        {A: entry(), B: entry(data_offsets=[32, 48])}, b"\0" * 48
    ),
    "bytes left over": lambda: file({A: entry()}, b"\0" * 32),
    "cut off": lambda: save({A: torch.ones(1, 4)})[:-1],
    "metadata that are numbers": lambda: file({"__metadata__": {"a": 1}, A: entry()}, b"\0" * 16),
}


def _pair(view: ModelView, **changed: torch.Tensor | None) -> dict[str, torch.Tensor]:
    out, width = sizes(view)
    given: dict[str, torch.Tensor | None] = {A: torch.ones(1, width), B: torch.ones(out, 1)}
    given |= {{"A": A, "B": B}.get(name, name): tensor for name, tensor in changed.items()}
    return {name: tensor for name, tensor in given.items() if tensor is not None}


def _with(value: float) -> Callable[[ModelView], dict[str, torch.Tensor]]:
    def made(view: ModelView) -> dict[str, torch.Tensor]:
        found = _pair(view)
        found[A][0, 0] = value
        return found

    return made


#: Of what an adapter of this base holds.
CONTENTS: dict[str, Callable[[ModelView], dict[str, torch.Tensor]]] = {
    "nothing": lambda view: {},
    "NaN": _with(float("nan")),
    "infinity": _with(float("inf")),
    "minus infinity": _with(-float("inf")),
    "half precision beyond its range": lambda view: _pair(
        view, A=torch.full((1, sizes(view)[1]), 1e6).half()
    ),
    "A alone": lambda view: _pair(view, B=None),
    "B alone": lambda view: _pair(view, A=None),
    "A too wide": lambda view: _pair(view, A=torch.ones(1, sizes(view)[1] + 1)),
    "B too high": lambda view: _pair(view, B=torch.ones(sizes(view)[0] + 1, 1)),
    "A transposed": lambda view: _pair(view, A=torch.ones(sizes(view)[1], 1)),
    "another rank": lambda view: _pair(
        view, A=torch.ones(2, sizes(view)[1]), B=torch.ones(sizes(view)[0], 2)
    ),
    "ranks that differ": lambda view: _pair(view, A=torch.ones(2, sizes(view)[1])),
    "a rank of 0": lambda view: _pair(
        view, A=torch.ones(0, sizes(view)[1]), B=torch.ones(sizes(view)[0], 0)
    ),
    "one dimension": lambda view: _pair(view, A=torch.ones(sizes(view)[1])),
    "three dimensions": lambda view: _pair(view, A=torch.ones(1, sizes(view)[1], 1)),
    "no dimension": lambda view: _pair(view, A=torch.tensor(1.0)),
    "whole numbers": lambda view: _pair(view, A=torch.ones(1, sizes(view)[1]).int()),
    "truth values": lambda view: _pair(view, A=torch.ones(1, sizes(view)[1]).bool()),
    "double precision": lambda view: _pair(view, A=torch.ones(1, sizes(view)[1]).double()),
    "zeros alone": lambda view: {name: t * 0 for name, t in _pair(view).items()},
    **{
        f"a tensor called {name!r:.60}": lambda view, name=name: _pair(
            view, **{name: torch.ones(1)}
        )
        for name in (
            "evil",
            "../../etc/passwd",
            "base_model.model.model.layers.0.mlp.down_proj.weight",
            "base_model.model.model.layers.0.mlp.down_proj.lora_magnitude_vector",
            "base_model.model.model.layers.0.mlp.down_proj.lora_A.bias",
            "base_model.model.lm_head.modules_to_save.weight",
            A + "\0",
            A + ".x",
            "x" * 100_000,
        )
    },
    **{
        f"a module called {path!r:.60}": lambda view, path=path: {
            f"base_model.model.{path}.lora_{part}.weight": torch.ones(1, 1) for part in "AB"
        }
        for path in (
            "model.layers.999.mlp.down_proj",
            "model.layers.-1.mlp.down_proj",
            "model.layers.0.mlp",
            "model.layers",
            "model.norm",
            "model",
            "..",
            "__class__",
            "model.__init__",
            "model.layers.0.mlp.down_proj.weight",
            "model.layers.0.mlp.down_proj.forward",
            "a" * 10_000,
        )
    },
}


def refused(view: ModelView, weights: bytes) -> None:
    tried["adapters"] = tried.get("adapters", 0) + 1
    with pytest.raises(UnprocessableRequest) as told:
        read_adapter(view, FORM, weights)
    assert told.value.code == "adapter_refused"
    assert told.value.message.startswith("adapter_model.safetensors: ")
    assert len(told.value.message) < 200_000


@pytest.mark.parametrize("name", FORMAT)
def test_what_is_no_safetensors(view: ModelView, name: str) -> None:
    refused(view, FORMAT[name]())


@pytest.mark.parametrize("name", CONTENTS)
def test_what_is_no_adapter_of_the_base(view: ModelView, name: str) -> None:
    refused(view, save(CONTENTS[name](view)))


def test_a_good_one_is_not(view: ModelView) -> None:
    assert read_adapter(view, FORM, save(_pair(view))).keys() == {"model.layers.0.mlp.down_proj"}
