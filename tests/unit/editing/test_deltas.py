"""Effects compose as the algebra says, and a delta's file holds them exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from editing.deltas import (
    Delta,
    DeltaFile,
    DeltaWriter,
    Effect,
    Gate,
    Sparse,
    compose,
    flattened,
    joined,
)
from editing.methods.alphaedit import earlier_keys

IN, OUT = 6, 5


@st.composite
def effects(draw: st.DrawFn, *, replacing: bool = True) -> Effect:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def gate(activation: str) -> Gate:
        count = draw(st.integers(1, 3))
        shared = torch.Generator().manual_seed(draw(st.integers(0, 1)))  # so that some are equal
        weight = torch.randn(IN, generator=shared) if draw(st.booleans()) else None
        offset = torch.randn(IN, generator=shared) if draw(st.booleans()) else None
        parts = tensor(count, IN), 2 * tensor(count), tensor(count, OUT), weight, offset
        return Gate(*parts, activation, draw(st.booleans()))

    rank, D = draw(st.integers(0, 4)), draw(st.sampled_from(["none", "dense", "sparse"]))
    mask = torch.rand(OUT, IN, generator=generator) < draw(st.sampled_from([0, 0.1, 0.3]))
    gates = [gate("relu") for _ in range(draw(st.integers(0, 2)))]
    if replacing and draw(st.booleans()):
        gates.append(gate("nearest"))
    return Effect(
        scale=tensor(OUT) if draw(st.booleans()) else None,
        shift=tensor(OUT) if draw(st.booleans()) else None,
        A=tensor(rank, IN) if rank else None,
        B=tensor(OUT, rank) if rank else None,
        dense=tensor(OUT, IN) if D == "dense" else None,
        sparse=Sparse.of(tensor(OUT, IN) * mask) if D == "sparse" else None,
        gates=tuple(gates),
    )


def gated(gate: Gate, x: Tensor, y: Tensor) -> Tensor:
    """A gate row by row and key by key."""
    out = y.clone()
    for row in range(len(x)):
        u = x[row] * (1 if gate.weight is None else gate.weight)
        u = u + (0 if gate.offset is None else gate.offset)
        u = u / u.norm() if gate.normalise else u
        distances = [float((u - key).norm()) for key in gate.keys]
        nearest = min(range(len(distances)), key=distances.__getitem__)
        if not gate.replaces:
            for key, bias, value in zip(gate.keys, gate.bias, gate.values, strict=True):
                out[row] += max(0.0, float(u @ key.to(u.dtype) + bias)) * value
        elif distances[nearest] <= gate.bias[nearest]:
            out[row] = gate.values[nearest]
    return out


def applied_one_by_one(stack: list[Effect], y: Tensor, x: Tensor) -> Tensor:
    """The oracle: each effect acts on the output of the module that those before it made."""
    y, x = y.double(), x.double()
    for effect in stack:
        y = y if effect.scale is None else effect.scale * y
        y = y if effect.shift is None else y + effect.shift
        if effect.A is not None and effect.B is not None:
            y = y + x @ (effect.B.double() @ effect.A.double()).T
        y = y if effect.dense is None else y + x @ effect.dense.double().T
        y = y if effect.sparse is None else y + x @ effect.sparse.dense().double().T
        for gate in effect.gates:
            y = gated(gate, x, y)
    return y.float()


@settings(max_examples=150)
@given(st.lists(effects(), min_size=1, max_size=4), st.integers(0, 1000))
def test_a_composed_stack_computes_what_its_effects_do_one_by_one(
    stack: list[Effect], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(3, IN, generator=generator), torch.randn(3, OUT, generator=generator)
    composed = compose({"m": effect} for effect in stack)["m"]
    expected = applied_one_by_one(stack, y, x)
    torch.testing.assert_close(composed.apply(x, y), expected, rtol=1e-3, atol=1e-3)
    replacing = sum(effect.replaces for effect in stack)
    assert len(list(composed.links())) in (replacing, replacing + 1)


@settings(max_examples=60)
@given(effects(replacing=False), st.lists(st.integers(0, IN - 1), min_size=1, max_size=5))
def test_ids_stand_for_one_hot_rows(effect: Effect, ids: list[int]) -> None:
    """An embedding's effect; gates look at numbers, and have no place there."""
    effect = Effect(effect.scale, effect.shift, effect.A, effect.B, effect.dense, effect.sparse)
    chosen, y = torch.tensor([ids]), torch.randn(1, len(ids), OUT)
    expected = effect.apply(torch.nn.functional.one_hot(chosen, IN).float(), y)
    torch.testing.assert_close(effect.apply(chosen, y), expected)


def test_the_sum_is_rounded_once() -> None:
    """Parts that cancel leave nothing behind in a base of few digits."""
    x, y = torch.ones(1, IN).bfloat16(), torch.full((1, OUT), 0.5).bfloat16()
    big = torch.full((OUT, IN), 1000.0)
    effect = Effect(shift=torch.full((OUT,), 0.25), dense=big, A=-big[:1], B=torch.ones(OUT, 1))
    assert torch.equal(effect.apply(x, y), torch.full((1, OUT), 0.75).bfloat16())


def test_what_is_sparse_stays_so_while_that_is_smaller() -> None:
    first, second = torch.zeros(2, 20, 30)
    first[3, 4], second[3, 4], second[5, 6] = 1.0, 2.0, 3.0
    few = compose([{"m": Effect(sparse=Sparse.of(D))} for D in (first, second)])["m"]
    assert few.sparse is not None
    assert few.sparse.values.numel() == 2
    assert torch.equal(few.sparse.dense(), first + second)
    half = torch.ones(20, 30) * (torch.arange(30) < 15)
    many = compose([{"m": Effect(sparse=Sparse.of(half))}] * 2)["m"]
    assert many.sparse is None
    assert many.dense is not None
    assert torch.equal(many.dense, 2 * half)


def test_gates_of_one_form_become_one() -> None:
    keys, bias, values = torch.randn(2, IN), torch.randn(2), torch.randn(2, OUT)
    plain, normalised = Gate(keys, bias, values), Gate(keys, bias, values, normalise=True)
    book = Gate(keys, bias, values, activation="nearest")
    stack = [{"m": Effect(gates=(gate,))} for gate in (plain, normalised, plain, book, plain)]
    first, rest = compose(stack)["m"].links()
    assert [len(gate.keys) for gate in first.gates] == [4, 2, 2]
    assert [len(gate.keys) for gate in rest.gates] == [2]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_codebook_answers_within_its_radius(count: int) -> None:
    """GRACE: the nearest key's value, where it is near enough; the output as it was elsewhere."""
    keys = torch.eye(IN)[:count]
    values = torch.arange(1.0, count + 1)[:, None].expand(count, OUT)
    book = Effect(gates=(Gate(keys, torch.full((count,), 0.5), values, activation="nearest"),))
    x = torch.cat([keys * 1.4, keys * 1.6])
    out = book.apply(x, torch.zeros(2 * count, OUT))
    assert torch.equal(out, torch.cat([values, torch.zeros(count, OUT)]))


def test_a_rank_that_no_longer_saves_turns_dense() -> None:
    rank_one = Effect(A=torch.ones(1, IN), B=torch.ones(OUT, 1))
    two = compose([{"m": rank_one}] * 2)["m"]
    assert (two.rank, two.dense) == (2, None)
    three = compose([{"m": rank_one}] * 3)["m"]
    assert three.rank == 0
    assert three.dense is not None
    assert torch.equal(three.dense, torch.full((OUT, IN), 3.0))


@settings(max_examples=80)
@given(effects(), st.booleans())
def test_a_file_holds_a_delta_exactly(effect: Effect, with_state: bool) -> None:
    state = {"keys": torch.arange(6.0).reshape(2, 3)} if with_state else {}
    delta = Delta({"model.layers.0.mlp.down_proj": effect}, "b" * 64, "rome", state)
    if not effect.parts():
        delta = Delta({}, "b" * 64, "rome", state)
    data = delta.to_bytes()
    read = Delta.from_bytes(data)
    assert (read.base_digest, read.method) == (delta.base_digest, delta.method)
    assert read.to_bytes() == data
    for module, one in delta.effects.items():
        kept = read.effects[module]
        assert kept.parts().keys() == one.parts().keys()
        for part, tensor in one.parts().items():
            assert torch.equal(kept.parts()[part], tensor)
        forms = [(gate.activation, gate.normalise) for gate in kept.gates]
        assert forms == [(gate.activation, gate.normalise) for gate in one.gates]
        assert kept.sparse is None or (one.sparse and kept.sparse.shape == one.sparse.shape)
    assert all(torch.equal(read.state[name], tensor) for name, tensor in state.items())


def test_one_step_does_not_go_on_after_it_replaced() -> None:
    book = Gate(torch.ones(1, IN), torch.ones(1), torch.ones(1, OUT), activation="nearest")
    composed = compose([{"m": Effect(gates=(book,))}, {"m": Effect(shift=torch.ones(OUT))}])
    with pytest.raises(ValueError, match="'m': its effect goes on"):
        Delta(composed, "b" * 64, "grace").to_bytes()


@given(st.lists(effects(replacing=False), min_size=1, max_size=3))
@settings(max_examples=20)
def test_joined_deltas_do_what_they_do_in_turn(stack: list[Effect]) -> None:
    keys = [torch.randn(IN, n + 1) for n in range(len(stack))]
    deltas = [
        Delta({"m": effect}, "0" * 64, "test", {"keys/0": key})
        for effect, key in zip(stack, keys, strict=True)
    ]
    whole = joined(deltas)
    x = torch.randn(4, IN)
    expected = actual = x @ torch.ones(IN, OUT)
    for effect in stack:
        expected = effect.apply(x, expected)
    torch.testing.assert_close(whole.effects["m"].apply(x, actual), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(whole.state["keys/0"], torch.cat(keys, dim=1))
    assert Delta.from_bytes(whole.to_bytes()).to_bytes() == whole.to_bytes()


def test_only_one_methods_deltas_are_joined() -> None:
    first, second = (Delta({"m": Effect(shift=torch.ones(OUT))}, "0" * 64, n) for n in "ab")
    assert joined([first]) is first
    for wrong in ([first, second], []):
        with pytest.raises(ValueError, match="one method"):
            joined(wrong)


def test_effects_that_share_memory_are_stored_apart() -> None:
    shared = torch.tensor([[0.0, 1.0, 0.0]])
    delta = Delta(
        {"a": Effect(A=shared, B=torch.ones(2, 1)), "b": Effect(A=torch.ones(1, 4), B=shared.T)},
        "0" * 64,
        "test",
    )
    again = Delta.from_bytes(delta.to_bytes())
    for path, effect in delta.effects.items():
        for part, tensor in effect.parts().items():
            assert torch.equal(again.effects[path].parts()[part], tensor)


@settings(max_examples=40)
@given(st.lists(effects(replacing=False), min_size=1, max_size=5), st.data())
def test_a_flattened_stack_does_the_same_to_the_bit(
    stack: list[Effect], data: st.DataObject
) -> None:
    keys = [torch.randn(IN, data.draw(st.integers(0, 3))) for _ in stack]
    deltas = [
        Delta({"m": effect}, "0" * 64, f"method{place}", {"keys/0": K} if K.numel() else {})
        for place, (effect, K) in enumerate(zip(stack, keys, strict=True))
    ]
    one = Delta.from_bytes(flattened(deltas).to_bytes())
    whole = compose(delta.effects for delta in deltas)["m"].parts()
    parts = compose([one.effects]).get("m", Effect()).parts()  # what does nothing is not kept
    assert parts.keys() == whole.keys()
    assert all(torch.equal(part, whole[name]) for name, part in parts.items())
    before, after = earlier_keys(deltas, 0), earlier_keys([one], 0)
    assert (before is None) == (after is None)
    assert before is None or after is None or torch.equal(before, after)


def test_what_goes_on_after_a_replacing_gate_is_no_one_delta() -> None:
    book = Gate(torch.ones(1, IN), torch.ones(1), torch.ones(1, OUT), activation="nearest")
    deltas = [Delta({"m": Effect(gates=(book,))}, "0" * 64, "grace")]
    deltas.append(Delta({"m": Effect(shift=torch.ones(OUT))}, "0" * 64, "rome"))
    with pytest.raises(ValueError, match="replaces the output"):
        flattened(deltas).to_bytes()
    with pytest.raises(ValueError, match="one base"):
        flattened([deltas[0], Delta(deltas[1].effects, "1" * 64, "rome")])


@given(st.lists(effects(), min_size=0, max_size=3), st.booleans())
@settings(max_examples=40)
def test_the_file_is_what_the_library_writes_and_reads_module_by_module(
    stack: list[Effect], has_state: bool
) -> None:
    made = {f"model.ö.{i}": effect for i, effect in enumerate(stack) if effect.parts()}
    state = {"keys/0": torch.randn(IN, 2)} if has_state else {}
    data = Delta(made, "0" * 64, "test", state).to_bytes()
    with safe_open_bytes(data) as (path, library):
        tensors = {name: library.get_tensor(name) for name in library.keys()}  # noqa: SIM118
        assert save(tensors, library.metadata()) == data
        file = DeltaFile(path)
        assert (file.base_digest, file.method, set(file.parts)) == ("0" * 64, "test", set(made))
        assert file.effect("elsewhere") is None
        assert file.state().keys() == state.keys()
        for module, effect in made.items():
            found = file.effect(module)
            assert found is not None
            assert found.parts().keys() == effect.parts().keys() == set(file.parts[module])
            assert all(torch.equal(found.parts()[n], t) for n, t in effect.parts().items())


@contextmanager
def safe_open_bytes(data: bytes) -> Iterator[tuple[Path, Any]]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "delta"
        path.write_bytes(data)
        with safe_open(path, "pt") as library:
            yield path, library


def test_a_module_is_written_before_the_next_is_there() -> None:
    scratch = BytesIO()
    writer = DeltaWriter(scratch, "0" * 64, "test")
    made = {name: Effect(dense=torch.randn(OUT, IN)) for name in "zyx"}
    for module, effect in made.items():
        before = len(scratch.getvalue())
        writer.add(module, effect)
        assert len(scratch.getvalue()) == before + OUT * IN * 4
    assert b"".join(writer.chunks()) == Delta(made, "0" * 64, "test").to_bytes()
