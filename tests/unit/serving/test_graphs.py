"""Decode steps over fixed memory give what plain steps give; on a GPU they are captured too."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from editing.deltas import Effect
from serving.graphs import STEADY, Capture, capture_for
from serving.plan import Segment, StepPlan
from serving.runner import Runner
from tests.models import VOCABULARY, random_effect, random_model
from tests.unit.serving.packing import DEVICE, Effects, placed

STEPS = STEADY + 30  # long enough that sequences begin new blocks, and blocks outgrow their room
WIDTH = 64  # hidden size of the small models
VERSIONS: dict[str, Effects] = {
    "a": {"model.layers.0.mlp": random_effect(1, WIDTH, WIDTH, "rank1")},
    "b": {},
    "c": {
        "model.layers.0.mlp": random_effect(2, WIDTH, WIDTH, "rank3"),
        "model.layers.1.mlp": random_effect(3, WIDTH, WIDTH, "scale"),
    },
}


def rerun(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What a graph does, without one: the same function over the same memory."""
    return compute


def decoded(runner: Runner, steps: int, sequences: int = 7) -> list[Tensor]:
    """The logits of steps in which each of some sequences computes one token."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCABULARY, (steps, sequences), generator=generator).tolist()
    found, effects = [], placed(VERSIONS, runner.device)
    for position, row in enumerate(tokens):
        plan = StepPlan(
            tuple(
                Segment(
                    key,
                    0,
                    sorted(VERSIONS)[key * len(VERSIONS) // sequences],
                    (token,),
                    position,
                    tuple(range(key * 4, key * 4 + position // 32 + 1)),
                    1,
                )
                for key, token in enumerate(row)
            )
        )
        found.append(runner.logits(plan, effects).to("cpu", copy=True))
    return found


class Reads(TorchDispatchMode):
    """Notes the tensors that work reads and did not make."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[weakref.ref[Tensor]] = []
        self._made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        made = {id(ref()) for ref in self._made}
        is_new = func is torch.ops.aten.lift_fresh.default  # what ``torch.tensor`` has just made
        for part in tree_leaves((args, kwargs or {})):
            if isinstance(part, Tensor) and id(part) not in made and not is_new:
                self.outside.append(weakref.ref(part))
        found = func(*args, **(kwargs or {}))
        self._made += [weakref.ref(part) for part in tree_leaves(found) if isinstance(part, Tensor)]
        return found


def plain_of(family: str) -> Runner:
    return Runner(random_model(family), kv_bytes=2**22)


def graphed_of(family: str, capture: Capture) -> Runner:
    return Runner(random_model(family).to(DEVICE), kv_bytes=2**22, capture=capture)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_steps_over_fixed_memory_are_the_plain_ones(family: str) -> None:
    plain, graphed = plain_of(family), graphed_of(family, capture_for(DEVICE) or rerun)
    expected, found = decoded(plain, STEPS), decoded(graphed, STEPS)
    assert graphed.graphs is not None
    assert graphed.graphs.replays > STEPS // 2
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


def wrong(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: compute() + 1


def without_numbers(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: compute() * torch.nan


def idle(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What a graph does that was captured on another device: it is empty."""
    logits = compute()
    return lambda: logits


@pytest.mark.parametrize("capture", [wrong, without_numbers, idle])
def test_a_graph_that_computes_something_else_is_not_used(capture: Capture) -> None:
    plain, graphed = plain_of("llama"), graphed_of("llama", capture)
    expected, found = decoded(plain, STEPS), decoded(graphed, STEPS)
    assert graphed.graphs is not None
    assert graphed.graphs.replays == 0
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


def test_a_step_without_numbers_makes_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """No replay could be compared with it."""
    monkeypatch.setitem(
        VERSIONS, "b", {"model.norm": Effect(shift=torch.full((WIDTH,), torch.nan))}
    )
    graphed = graphed_of("llama", wrong)
    found = decoded(graphed, STEPS)
    assert found[-1].isnan().any()
    assert found[-1].isfinite().any()
    assert graphed.graphs is not None
    assert graphed.graphs.replays == 0


def test_a_capture_that_fails_leaves_plain_steps() -> None:
    def failing(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    plain, graphed = plain_of("llama"), graphed_of("llama", failing)
    for own, other in zip(decoded(graphed, STEPS), decoded(plain, STEPS), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


def test_what_a_graph_reads_lives_as_long_as_it() -> None:
    """A replay looks at the same addresses, whatever has come to lie there."""
    dead: list[int] = []

    def noted(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        with Reads() as reads:
            compute()

        def replay() -> Tensor:
            dead.append(sum(read() is None for read in reads.outside))
            return compute()

        return replay

    graphed = Runner(random_model("llama"), kv_bytes=2**22, capture=noted)
    decoded(graphed, STEPS)
    assert graphed.graphs is not None
    assert graphed.graphs.replays > STEPS // 2
    assert len(dead) > STEPS // 2
    assert not any(dead)
