"""Effects compose as the algebra says, and a delta's file holds them exactly."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from editing.deltas import Delta, Effect, compose

IN, OUT = 6, 5


@st.composite
def effects(draw: st.DrawFn) -> Effect:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rank = draw(st.integers(0, 4))
    return Effect(
        scale=tensor(OUT) if draw(st.booleans()) else None,
        shift=tensor(OUT) if draw(st.booleans()) else None,
        A=tensor(rank, IN) if rank else None,
        B=tensor(OUT, rank) if rank else None,
        dense=tensor(OUT, IN) if draw(st.booleans()) else None,
    )


def applied_one_by_one(stack: list[Effect], W: Tensor, x: Tensor) -> Tensor:
    """The oracle: each effect acts on the module that the ones before it made."""
    weight, bias = W.double(), torch.zeros(OUT, dtype=torch.float64)
    for effect in stack:
        if effect.scale is not None:
            weight, bias = effect.scale[:, None] * weight, effect.scale * bias
        if effect.shift is not None:
            bias = bias + effect.shift
        if effect.A is not None and effect.B is not None:
            weight = weight + effect.B.double() @ effect.A.double()
        if effect.dense is not None:
            weight = weight + effect.dense
    return (x.double() @ weight.T + bias).float()


@settings(deadline=None, max_examples=60)
@given(st.lists(effects(), min_size=1, max_size=4), st.integers(0, 1000))
def test_a_composed_stack_computes_what_its_effects_do_one_by_one(
    stack: list[Effect], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    W, x = torch.randn(OUT, IN, generator=generator), torch.randn(3, IN, generator=generator)
    composed = compose({"m": effect} for effect in stack)["m"]
    expected = applied_one_by_one(stack, W, x)
    torch.testing.assert_close(composed.apply(x, x @ W.T), expected, rtol=1e-3, atol=1e-3)


def test_a_rank_that_no_longer_saves_turns_dense() -> None:
    rank_one = Effect(A=torch.ones(1, IN), B=torch.ones(OUT, 1))
    two = compose([{"m": rank_one}] * 2)["m"]
    assert (two.rank, two.dense) == (2, None)
    three = compose([{"m": rank_one}] * 3)["m"]
    assert three.rank == 0
    assert three.dense is not None
    assert torch.equal(three.dense, torch.full((OUT, IN), 3.0))


@settings(deadline=None, max_examples=30)
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
        for part, tensor in one.parts().items():
            assert torch.equal(read.effects[module].parts()[part], tensor)
    assert all(torch.equal(read.state[name], tensor) for name, tensor in state.items())
