from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from editing.deltas import Effect, Gate
from editing.deltas.fit import check_effects
from editing.models.loading import load_model
from registry.bases import Base
from serving.invariance import find_min_rows
from serving.plan import Segment, StepPlan
from serving.runner import Runner, padded_rows
from serving.selftest import check_base
from tests.models import VOCABULARY, random_effect, random_model
from tests.unit.serving.packing import (
    DEVICE,
    Script,
    packed_logits,
    placed,
    plain_logits,
    random_script,
)

FIRST = "model.layers.0.mlp.down_proj"
DOWN = "model.layers.1.mlp.down_proj"
#: Whole and cut prompts, one token a step, steps in which a sequence rests; past every window.
COUNTS = ((9, 1, 1, 1, 1), (4, 7, 1, 1, 1), (0, 13, 1, 2, 1), (2, 1, 0, 5, 1), (0, 0, 1, 1, 1))


def scripts(versions: list[str]) -> dict[str, Script]:
    return {
        f"s{place}": random_script(place, version, *counts, vocabulary=VOCABULARY)
        for place, (version, counts) in enumerate(zip(versions, COUNTS, strict=True))
    }


def runner_of(base: Base, *, invariant: bool = False) -> Runner:
    return Runner(
        load_model(base).to(DEVICE), kv_bytes=2**22, min_rows=4, batch_invariant=invariant
    )


def test_without_padding_bits_depend_on_the_batch_where_min_rows_says_so(
    saved: Callable[[str], Base],
) -> None:
    base = saved("llama")
    needed = find_min_rows(load_model(base).to(DEVICE))
    runner = Runner(load_model(base).to(DEVICE), kv_bytes=2**22, min_rows=1)
    company = scripts(["base"] * 5)
    together = packed_logits(runner, company, {"base": {}})
    alone = packed_logits(runner, {"s0": company["s0"]}, {"base": {}})
    is_equal = all(torch.equal(logits, together[place]) for place, logits in alone.items())
    assert is_equal == (needed == 1)


def test_bfloat16_passes_the_self_test(saved: Callable[[str], Base]) -> None:
    model = load_model(saved("llama"), "bfloat16").to(DEVICE)
    check_base("llama", Runner(model, kv_bytes=2**22, min_rows=4))


def test_effects_that_do_not_fit_are_named(saved: Callable[[str], Base]) -> None:
    model = load_model(saved("llama"))
    for path in ("model.layers.9.mlp.down_proj", "model", "model.layers.0", "model.layers.0.mlp.x"):
        with pytest.raises(ValueError, match=path):
            check_effects(model, {path: Effect(shift=torch.zeros(64))})
    with pytest.raises(ValueError, match=r"down_proj.*\(64, 96\)"):
        check_effects(model, {"model.layers.0.mlp.down_proj": Effect(dense=torch.zeros(96, 64))})


def test_a_full_row_of_no_logits_is_fine(saved: Callable[[str], Base]) -> None:
    """A step may hold only the beginnings of prompts."""
    runner = runner_of(saved("llama"))
    part = Segment("a", 0, "v", (1, 2, 3), 0, (0,), 0)
    effects = placed({"v": {"model.layers.1.mlp": Effect(shift=torch.ones(64))}})
    assert runner.logits(StepPlan((part,)), effects).shape == (0, VOCABULARY)


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("outputs", [1, 2, 5, 9])
def test_logits_are_given_for_the_last_tokens_that_want_them(
    saved: Callable[[str], Base], outputs: int, invariant: bool
) -> None:
    """Beside a single token in the row's first place, and few enough for padding."""
    runner = runner_of(saved("llama"), invariant=invariant)
    long, short = (
        random_script(n, "v", 9, vocabulary=VOCABULARY).tokens[: 9 - 4 * n] for n in range(2)
    )
    begun = Segment("short", 0, "v", short[:-1], 0, (0,), 0)
    effects = {"v": {DOWN: random_effect(1, 64, 96, "all")}}
    runner.logits(StepPlan((begun,)), placed(effects))
    last = Segment("short", 0, "v", short[-1:], len(short) - 1, (0,), 1)
    whole = Segment("long", 0, "v", long, 0, (1,), outputs)
    logits = runner.logits(StepPlan((last, whole)), placed(effects)).cpu()
    model = random_model("llama")
    expected = [plain_logits(model, tokens, effects["v"]) for tokens in (short, long)]
    wanted = torch.cat([expected[0][-1:], expected[1][-outputs:]])
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_steps_of_many_sizes_are_products_of_few(saved: Callable[[str], Base]) -> None:
    """A CPU's products are compiled and kept for each number of rows."""
    runner = Runner(load_model(saved("llama")), kv_bytes=2**22, min_rows=4)
    seen: set[int] = set()
    runner.model.get_submodule(FIRST).register_forward_hook(
        lambda _module, args, _output: seen.add(args[0].shape[1])
    )
    for rows in range(1, 129):
        blocks = tuple(range(-(-rows // 32)))
        runner.logits(StepPlan((Segment("a", 0, "v", (1,) * rows, 0, blocks, 1),)), {"v": {}})
    assert seen == {padded_rows(max(4, rows)) for rows in range(1, 129)}
    assert len(seen) == 29 + 16 + 16
    sizes = [padded_rows(rows) for rows in range(1, 4097)]
    assert len(set(sizes)) == 32 + 16 * 7
    assert all(rows <= size <= rows * 17 / 16 for rows, size in enumerate(sizes, 1))


#: Effects that fit and are finite, as the loader demands, and whose products are not.
HUGE = 3e38
POISONS = {
    "scale": Effect(scale=torch.full((64,), HUGE)),
    "shift": Effect(scale=torch.full((64,), HUGE), shift=torch.full((64,), HUGE)),
    "A": replace(random_effect(1, 64, 96, "rank3"), A=torch.full((3, 96), HUGE)),
    "B": replace(random_effect(1, 64, 96, "rank3"), B=torch.full((64, 3), -HUGE)),
    "rank1": replace(random_effect(1, 64, 96, "rank1"), A=torch.full((1, 96), HUGE)),
    "rank20": replace(random_effect(1, 64, 96, "rank20"), B=torch.full((64, 20), HUGE)),
    "dense": Effect(dense=torch.full((64, 96), HUGE)),
    "gates": Effect(
        gates=(Gate(torch.zeros(2, 96), torch.ones(2) * 9, torch.full((2, 64), HUGE)),)
    ),
}


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("poison", POISONS)
def test_numbers_that_are_not_finite_stay_with_their_sequence(
    saved: Callable[[str], Base], poison: str, invariant: bool
) -> None:
    """In the step, with all sorts of versions beside it, and in the blocks that it leaves."""
    runner = runner_of(saved("llama"), invariant=invariant)
    kinds = ("rank1", "rank3", "rank20", "dense", "sparse", "scale", "gated", "all")
    effects = {kind: {FIRST: random_effect(n, 64, 96, kind)} for n, kind in enumerate(kinds)}
    effects["m-poison"] = {FIRST: POISONS[poison]}  # it stands in the middle of the row
    counts = [(40, 1, 1), (31, 1, 1), (5, 28, 1), (1, 1, 1)]
    neighbours = {
        f"{kind}{n}": random_script(n, kind, *counts[(n + place) % 4], vocabulary=VOCABULARY)
        for place, kind in enumerate(kinds)
        for n in range(2)
    }
    expected = packed_logits(runner, neighbours, effects)
    poisoned = {
        f"m-poison{n}": random_script(n, "m-poison", *each, vocabulary=VOCABULARY)
        for n, each in enumerate(counts)
    }
    for company in (poisoned | neighbours, neighbours, poisoned | neighbours):
        found = packed_logits(runner, company, effects)
        for (key, length), logits in found.items():
            if key in neighbours:
                torch.testing.assert_close(logits, expected[key, length], rtol=1e-4, atol=1e-4)
            else:
                assert not logits.isfinite().all()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("outputs", [1, 5])
def test_a_step_that_fails_leaves_the_runner_as_it_was(
    saved: Callable[[str], Base], layer: int, outputs: int
) -> None:
    """Also in the last layer, of which a step may compute a part of the rows only."""
    runner = runner_of(saved("llama"))
    path = f"model.layers.{layer}.mlp.down_proj"
    effects = placed({"good": {path: random_effect(1, 64, 96, "rank3")}})
    bad = placed({"bad": {path: Effect(dense=torch.zeros(3, 3))}})
    good = StepPlan((Segment("a", 0, "good", (1, 2, 3, 4, 5), 0, (0,), outputs),))
    expected = runner.logits(good, effects)
    mixed = StepPlan((Segment("b", 0, "bad", (1, 2, 3, 4, 5), 0, (1,), outputs), *good.segments))
    for _ in range(2):
        with pytest.raises(RuntimeError):
            runner.logits(mixed, effects | bad)
        assert torch.equal(runner.logits(good, effects), expected)
    assert "forward" not in vars(runner.model.get_submodule("model.layers.1"))
