"""Decode steps over fixed memory give what plain steps give; capturing alone needs a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from serving.graphs import STEADY, Capture
from serving.plan import Segment, StepPlan
from serving.runner import Runner
from tests.models import VOCABULARY, random_effect, random_model
from tests.unit.serving.packing import Effects

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
    found = []
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
        found.append(runner.logits(plan, VERSIONS))
    return found


def runner_of(family: str, capture: Capture | None) -> Runner:
    return Runner(random_model(family), kv_bytes=2**22, capture=capture)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_steps_over_fixed_memory_are_the_plain_ones(family: str) -> None:
    plain, graphed = runner_of(family, None), runner_of(family, rerun)
    expected, found = decoded(plain, STEPS), decoded(graphed, STEPS)
    assert graphed.graphs is not None
    assert graphed.graphs.replays > STEPS // 2
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


def test_a_graph_that_computes_something_else_is_not_used() -> None:
    def wrong(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: compute() + 1

    plain, graphed = runner_of("llama", None), runner_of("llama", wrong)
    expected, found = decoded(plain, STEPS), decoded(graphed, STEPS)
    assert graphed.graphs is not None
    assert graphed.graphs.replays == 0
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


def test_a_capture_that_fails_leaves_plain_steps() -> None:
    def failing(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    plain, graphed = runner_of("llama", None), runner_of("llama", failing)
    for own, other in zip(decoded(graphed, STEPS), decoded(plain, STEPS), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
