from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import InvalidRequest, TooManyRequests
from serving.plan import StepPlan
from serving.scheduler import CHUNK, Limits, Scheduler, Sequence, completion_limit
from serving.spans import Span, SpanAllocator

LIMITS = Limits(max_running=4, max_waiting=8, step_tokens=1024, kv_tokens=4096, context_length=2048)


def sequence(key: str, prompt: int = 3, most: int = 2, version: str = "v") -> Sequence:
    return Sequence(key, version, tuple(range(prompt)), most)


def carry_out(scheduler: Scheduler, plan: StepPlan) -> None:
    """What the lane does after a step: every sampling segment gets token 9."""
    for segment in plan.segments:
        scheduler.advance(segment, 9 if segment.samples else None)


def keys(plan: StepPlan | None) -> list[object]:
    return [] if plan is None else [segment.key for segment in plan.segments]


def test_nothing_to_do_is_no_plan() -> None:
    assert Scheduler(LIMITS).plan() is None


def test_prompts_and_next_tokens_share_a_row() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.add(sequence("a"))
    first = scheduler.plan()
    assert first is not None
    carry_out(scheduler, first)
    scheduler.add(sequence("b", prompt=5))
    plan = scheduler.plan()
    assert plan is not None
    a, b = plan.segments
    assert (a.key, a.tokens, a.position, a.samples) == ("a", (9,), 3, True)
    assert (b.key, b.tokens, b.position, b.samples) == ("b", (0, 1, 2, 3, 4), 0, True)
    assert plan.rows == 6
    assert b.slot >= 5, "the slots of a sequence are its own"


def test_a_row_is_ordered_by_version_and_in_a_version_by_age() -> None:
    scheduler = Scheduler(LIMITS)
    for key, version in [("a", "v2"), ("b", "v1"), ("c", "v2"), ("d", "v1")]:
        scheduler.add(sequence(key, version=version))
    plan = scheduler.plan()
    assert keys(plan) == ["b", "d", "a", "c"]
    assert plan is not None
    assert [keys(part) for part in plan.by_version()] == [["b", "d"], ["a", "c"]]


def test_first_come_first_served() -> None:
    scheduler = Scheduler(replace(LIMITS, max_running=1))
    for key in "abc":
        scheduler.add(sequence(key))
    assert (scheduler.running, scheduler.waiting) == (0, 3)
    assert keys(scheduler.plan()) == ["a"]
    scheduler.remove("a")
    assert keys(scheduler.plan()) == ["b"]


def test_a_prompt_is_cut_on_a_grid_whatever_else_runs() -> None:
    alone, busy = Scheduler(LIMITS), Scheduler(LIMITS)
    busy.add(sequence("x", prompt=700))
    busy.add(sequence("y", prompt=300))
    cuts = []
    for scheduler in (alone, busy):
        scheduler.add(sequence("long", prompt=2 * CHUNK + 10))
        found = []
        for _ in range(6):
            plan = scheduler.plan()
            assert plan is not None
            assert plan.rows <= LIMITS.step_tokens
            found += [
                (s.position, len(s.tokens), s.samples) for s in plan.segments if s.key == "long"
            ]
            carry_out(scheduler, plan)
        cuts.append([cut for cut in found if cut[0] < 2 * CHUNK + 10])
    assert cuts[0] == cuts[1]
    assert cuts[0] == [(0, CHUNK, False), (CHUNK, CHUNK, False), (2 * CHUNK, 10, True)]


def test_a_full_cache_makes_waiting_not_failing() -> None:
    scheduler = Scheduler(replace(LIMITS, kv_tokens=20))
    scheduler.add(sequence("a", prompt=8, most=4))
    scheduler.add(sequence("b", prompt=8, most=4))
    scheduler.add(sequence("c", prompt=1, most=1))
    assert keys(scheduler.plan()) == ["a"], "c is small, but b came first"
    assert scheduler.spans.used == 12
    scheduler.remove("a")
    assert keys(scheduler.plan()) == ["b", "c"]


@pytest.mark.parametrize(
    ("limits", "names"),
    [(LIMITS, "context length"), (replace(LIMITS, kv_tokens=100), "ERRATA_KV_TOKENS")],
)
def test_what_can_never_fit_is_refused_by_name(limits: Limits, names: str) -> None:
    with pytest.raises(InvalidRequest, match=names) as caught:
        Scheduler(limits).add(sequence("a", prompt=90, most=2000))
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "max_tokens"


def test_without_max_tokens_a_completion_takes_what_is_left() -> None:
    assert completion_limit(LIMITS, 48, None) == 2000
    assert completion_limit(LIMITS, 48, 7) == 7
    with pytest.raises(InvalidRequest) as caught:
        completion_limit(LIMITS, 2048, None)
    assert caught.value.param == "prompt"


def test_a_full_queue_says_when_to_come_back() -> None:
    scheduler = Scheduler(replace(LIMITS, max_waiting=2))
    scheduler.add(sequence("a"))
    scheduler.add(sequence("b"))
    with pytest.raises(TooManyRequests) as caught:
        scheduler.add(sequence("c"))
    assert caught.value.retry_after


def test_a_removed_sequence_leaves_nothing() -> None:
    scheduler = Scheduler(replace(LIMITS, max_running=1))
    scheduler.add(sequence("running"))
    scheduler.add(sequence("waiting"))
    plan = scheduler.plan()
    assert scheduler.remove("waiting") is not None
    assert scheduler.remove("running") is not None
    assert scheduler.remove("running") is None
    assert (len(scheduler), scheduler.spans.used) == (0, 0)
    assert plan is not None
    carry_out(scheduler, plan)  # the step was in work when they left
    assert scheduler.plan() is None


@given(
    requests=st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 12), st.sampled_from("uvw")), max_size=30
    ),
    max_running=st.integers(1, 9),
    step_tokens=st.integers(16, 64),
    kv_tokens=st.integers(72, 200),
)
def test_every_sequence_ends_with_exactly_its_tokens(
    requests: list[tuple[int, int, str]], max_running: int, step_tokens: int, kv_tokens: int
) -> None:
    limits = Limits(max_running, 100, step_tokens, kv_tokens, 72)
    scheduler = Scheduler(limits)
    alive = {}
    for number, (prompt, most, version) in enumerate(requests):
        alive[number] = Sequence(number, version, tuple(range(prompt)), most)
        scheduler.add(alive[number])
    steps = 0
    seen: dict[object, list[int]] = {number: [] for number in alive}
    while (plan := scheduler.plan()) is not None:
        steps += 1
        assert steps < 5000
        assert 0 < plan.rows <= step_tokens
        versions = [segment.version for segment in plan.segments]
        assert versions == sorted(versions)
        for segment in plan.segments:
            assert segment.position == len(seen[segment.key])
            seen[segment.key] += segment.tokens
        carry_out(scheduler, plan)
        for segment in plan.sampling:
            own = alive[segment.key]  # type: ignore[index]
            if len(own.completion) == own.max_tokens:
                scheduler.remove(segment.key)
    assert len(scheduler) == 0
    assert scheduler.spans.used == 0
    for number, (prompt, most, _) in enumerate(requests):
        assert seen[number] == [*range(prompt), *[9] * (most - 1)]


@given(st.lists(st.integers(1, 40), max_size=40), st.randoms(use_true_random=False))
def test_spans_never_overlap_and_all_come_back(sizes: list[int], random: object) -> None:
    spans = SpanAllocator(100)
    held: list[Span] = []
    for size in sizes:
        span = spans.allocate(size)
        if span is None:
            assert held, "an empty pool holds any size up to its own"
            spans.free(held.pop(random.randrange(len(held))))  # type: ignore[attr-defined]
            continue
        assert all(
            span.start + span.size <= o.start or o.start + o.size <= span.start for o in held
        )
        assert 0 <= span.start <= 100 - size
        held.append(span)
        assert spans.used == sum(span.size for span in held)
    for span in held:
        spans.free(span)
    assert spans.allocate(100) == Span(0, 100)


def test_the_scheduler_and_the_client_load_no_torch() -> None:
    code = (
        "import serving.scheduler, serving.client, sys;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
