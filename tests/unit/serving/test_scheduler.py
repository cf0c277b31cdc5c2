from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import InvalidRequest
from serving.blocks import BLOCK
from serving.plan import StepPlan
from serving.scheduler import CHUNK, Limits, Scheduler, Sequence, completion_limit

LIMITS = Limits(max_running=4, max_waiting=8, step_tokens=1600, kv_blocks=128, context_length=2048)
GRID = replace(LIMITS, grid=CHUNK)


@dataclass
class Served:
    """A scheduler and all that a lane does around it, with a pool that remembers what is where.

    Of each token's keys and values it keeps what decides them: whose they are and every token so
    far. A step that would read others' fails.
    """

    limits: Limits
    sequences: dict[object, Sequence] = field(default_factory=dict)
    pool: dict[tuple[int, int], tuple[object, ...]] = field(default_factory=dict)
    computed: int = 0
    most_running: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.limits)

    def add(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.scheduler.add(sequence)
            self.sequences[sequence.key] = sequence

    def step(self) -> StepPlan | None:
        plan = self.scheduler.plan()
        if plan is None:
            return None
        running = [s for s in self.sequences.values() if self.is_running(s)]
        voices = sum(len(sequence.versions) for sequence in running)
        assert len(running) == 1 or voices <= self.limits.running
        assert 0 < plan.rows <= self.limits.step_tokens
        versions = [segment.version for segment in plan.segments]
        assert versions == sorted(versions)
        self.computed += plan.rows
        self._write(plan)
        self._check_reads(plan)
        for segment in plan.segments:
            self.scheduler.advance(segment)
        for key in dict.fromkeys(segment.key for segment in plan.segments):
            sequence = self.sequences[key]
            if sequence.computed == sequence.known:
                self.scheduler.append(key, next_token(sequence))
                if len(sequence.completion) >= sequence.max_tokens:
                    self.scheduler.remove(key)
        return plan

    def run(self) -> None:
        """Until nothing is left; every sequence must come to its end."""
        for _ in range(5000):
            if self.step() is None:
                break
        assert len(self.scheduler) == 0
        assert self.scheduler.blocks.held == 0
        for sequence in self.sequences.values():
            assert len(sequence.completion) == max(1, sequence.max_tokens)
            assert sequence.cached < len(sequence.prompt)

    def is_running(self, sequence: Sequence) -> bool:
        return any(sequence is running for running in self.scheduler._running.values())

    def _write(self, plan: StepPlan) -> None:
        for segment in plan.segments:
            sequence = self.sequences[segment.key]
            assert segment.version == sequence.versions[segment.voice]
            assert segment.tokens == sequence.tokens(segment.position, segment.end)
            for position in range(segment.position, segment.end):
                self.pool[self._place(segment.blocks, position)] = self._kv(segment, position)

    def _check_reads(self, plan: StepPlan) -> None:
        for segment in plan.segments:
            for position in range(segment.end):
                found = self.pool[self._place(segment.blocks, position)]
                assert found == self._kv(segment, position), "another's keys and values"

    def _kv(self, segment: object, position: int) -> tuple[object, ...]:
        sequence = self.sequences[segment.key]  # type: ignore[attr-defined]
        version = segment.version  # type: ignore[attr-defined]
        return (sequence.tenant, version, sequence.tokens(0, position + 1))

    @staticmethod
    def _place(blocks: tuple[int, ...], position: int) -> tuple[int, int]:
        return blocks[position // BLOCK], position % BLOCK


def next_token(sequence: Sequence) -> int:
    return (sum(sequence.prompt) + 7 * sum(sequence.completion) + sequence.known) % 5


def sequence(key: str, prompt: int = 3, most: int = 2, version: str = "v") -> Sequence:
    return Sequence(key, (version,), tuple(range(prompt)), most)


def keys(plan: StepPlan | None) -> list[object]:
    return [] if plan is None else [segment.key for segment in plan.segments]


def test_nothing_to_do_is_no_plan() -> None:
    assert Scheduler(LIMITS).plan() is None


def test_prompts_and_next_tokens_share_a_row() -> None:
    served = Served(LIMITS)
    served.add(sequence("a"))
    assert served.step() is not None
    served.add(sequence("b", prompt=5))
    plan = served.step()
    assert plan is not None
    a, b = plan.segments
    assert (a.key, a.tokens, a.position, a.outputs) == ("a", (1,), 3, 1)
    assert (b.key, b.tokens, b.position, b.outputs) == ("b", (0, 1, 2, 3, 4), 0, 1)
    assert (plan.rows, plan.outputs) == (6, 2)
    assert not set(a.blocks) & set(b.blocks)


def test_a_row_is_ordered_by_version_and_in_a_version_by_age() -> None:
    served = Served(LIMITS)
    for key, version in [("a", "v2"), ("b", "v1"), ("c", "v2"), ("d", "v1")]:
        served.add(sequence(key, version=version))
    assert keys(served.step()) == ["b", "d", "a", "c"]


def test_first_come_first_served() -> None:
    scheduler = Scheduler(replace(LIMITS, max_running=1))
    for key in "abc":
        scheduler.add(sequence(key))
    assert (scheduler.running, scheduler.waiting) == (0, 3)
    assert keys(scheduler.plan()) == ["a"]
    scheduler.remove("a")
    assert keys(scheduler.plan()) == ["b"]


def test_a_long_prompt_is_computed_as_the_budget_allows() -> None:
    served = Served(replace(LIMITS, step_tokens=100))
    served.add(sequence("a", prompt=150), Sequence("b", ("v",), (9,) * 60, 2))
    plans = [served.step() for _ in range(3)]
    assert [
        [(s.key, len(s.tokens), s.outputs) for s in plan.segments] for plan in plans if plan
    ] == [[("a", 100, 0)], [("a", 50, 1), ("b", 50, 0)], [("a", 1, 1), ("b", 10, 1)]]


def test_a_prompt_is_cut_on_a_grid_whatever_else_runs() -> None:
    alone, busy = Served(GRID), Served(GRID)
    busy.add(sequence("x", prompt=700), sequence("y", prompt=1100))
    cuts = []
    for served in (alone, busy):
        served.add(Sequence("long", ("v",), (9,) * (2 * CHUNK + 10), 2))
        found = []
        while (plan := served.step()) is not None:
            found += [
                (s.position, len(s.tokens), s.outputs) for s in plan.segments if s.key == "long"
            ]
        cuts.append(found)
    assert cuts[0] == cuts[1]
    assert cuts[0] == [(0, CHUNK, 0), (CHUNK, CHUNK, 0), (2 * CHUNK, 10, 1), (2 * CHUNK + 10, 1, 1)]


@pytest.mark.parametrize("grid", [1, CHUNK])
@pytest.mark.parametrize("step_tokens", [16, 33, 100, 777, 2048])
def test_every_step_has_room_for_a_chunk_of_every_voice(step_tokens: int, grid: int) -> None:
    """Otherwise what runs could keep a prompt from ever being computed."""
    limits = replace(LIMITS, step_tokens=step_tokens, grid=grid, max_running=10_000)
    assert limits.running + 3 * limits.chunk <= step_tokens
    served = Served(limits)
    served.add(Sequence("proxy", ("v", "expert", "anti"), tuple(range(300)), 3))
    served.run()


# -- the prefix cache ---------------------------------------------------------------------------


def test_a_prompt_takes_over_what_begins_alike() -> None:
    served = Served(LIMITS)
    served.add(sequence("first", prompt=100, most=1))
    served.run()
    same, longer, other = sequence("a", 100), sequence("b", 80), Sequence("c", ("v",), (9,) * 80, 2)
    served.add(same, longer, other)
    served.step()
    assert [each.cached for each in (same, longer, other)] == [96, 64, 0]
    assert served.computed == 100 + 4 + 16 + 80


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    served = Served(LIMITS)
    for key in "ab":
        served.add(sequence(key, prompt=2 * BLOCK, most=1))
        served.run()
    assert served.sequences["b"].cached == BLOCK


@pytest.mark.parametrize("change", [{"tenant": "else"}, {"versions": ("w",)}])
def test_no_prefix_crosses_tenants_or_versions(change: dict[str, object]) -> None:
    served = Served(LIMITS)
    served.add(sequence("a", prompt=100))
    served.run()
    served.add(replace(sequence("b", prompt=100), **change))
    served.run()
    assert served.sequences["b"].cached == 0


def test_prompts_that_begin_alike_compute_it_once_though_they_come_at_once() -> None:
    served = Served(replace(LIMITS, max_running=16, max_waiting=16))
    common = tuple(range(4 * BLOCK))
    served.add(*(Sequence(str(n), ("v",), (*common, n, n), 1) for n in range(10)))
    other = Sequence("other", ("v",), (9,) * 40, 1)
    served.add(other)
    assert keys(served.step()) == ["0", "other"], "who waits for a beginning keeps nobody waiting"
    served.run()
    assert served.computed == len(common) + 10 * 2 + 40


def test_who_waits_for_a_beginning_goes_on_when_that_is_cancelled() -> None:
    served = Served(replace(LIMITS, step_tokens=16))
    served.add(sequence("a", prompt=100), sequence("b", prompt=100))
    assert keys(served.step()) == ["a"]
    served.scheduler.remove("a")
    del served.sequences["a"]
    served.run()
    assert served.sequences["b"].completion


def test_a_completion_can_be_gone_on_with() -> None:
    served = Served(LIMITS)
    served.add(sequence("a", prompt=20, most=60))
    served.run()
    first = served.sequences["a"]
    served.add(Sequence("b", ("v",), (*first.prompt, *first.completion, 1, 2), 2))
    served.run()
    assert served.sequences["b"].cached == 64


def test_on_a_grid_only_what_was_computed_on_it_is_taken_over() -> None:
    served = Served(GRID)
    served.add(sequence("a", prompt=300, most=300))
    served.run()
    first = served.sequences["a"]
    served.add(
        sequence("b", prompt=300), Sequence("c", ("v",), (*first.prompt, *first.completion), 2)
    )
    served.run()
    assert [served.sequences[key].cached for key in "bc"] == [CHUNK, CHUNK]


def test_who_wants_its_prompts_logits_computes_all_of_it() -> None:
    served = Served(LIMITS)
    served.add(sequence("a", prompt=600))
    served.run()
    echo = replace(sequence("echo", prompt=600), wants_prompt_logits=True)
    served.add(echo)
    outputs = []
    while (plan := served.step()) is not None:
        outputs += [(s.position, len(s.tokens), s.outputs) for s in plan.segments]
    assert outputs == [(0, 256, 256), (256, 256, 256), (512, 88, 88), (600, 1, 1)]
    assert echo.cached == 0


# -- a full pool --------------------------------------------------------------------------------


def test_the_youngest_gives_way_and_comes_back() -> None:
    served = Served(replace(LIMITS, kv_blocks=6))
    served.add(*(Sequence(key, ("v",), (ord(key),) * 30, 70) for key in "abc"))
    order: list[object] = []
    while served.step() is not None:
        order += [
            k for k, s in served.sequences.items() if len(s.completion) == 70 and k not in order
        ]
    assert served.scheduler.preempted
    assert order == ["a", "b", "c"]
    served.run()


def test_a_preempted_sequence_is_computed_again_as_a_chunk() -> None:
    assert again(LIMITS) == [(BLOCK, 39 - BLOCK)], "its first block is in the cache still"


def test_on_a_grid_what_was_chosen_is_computed_again_token_by_token() -> None:
    assert again(GRID) == [(0, 30), *((position, 1) for position in range(30, 39))]


def again(limits: Limits) -> list[tuple[int, int]]:
    """The segments that compute a preempted sequence of 30 tokens and 9 chosen ones again."""
    served = Served(limits)
    served.add(sequence("a", prompt=30, most=20))
    for _ in range(9):
        served.step()
    (running,) = served.scheduler._running.values()
    served.scheduler._preempt(running)
    found = []
    while running.completion[9:] == []:
        plan = served.step()
        assert plan is not None
        found += [(segment.position, len(segment.tokens)) for segment in plan.segments]
    return found


def test_a_preempted_sequences_own_blocks_are_no_hits() -> None:
    served = Served(LIMITS)
    served.add(sequence("a", prompt=10, most=100))
    for _ in range(80):
        served.step()
    (running,) = served.scheduler._running.values()
    served.scheduler._preempt(running)
    before = served.computed
    served.step()
    assert served.computed - before < BLOCK, "they are in the cache still"
    assert running.cached == 0


def test_what_a_prompt_had_computed_before_a_preemption_is_no_hit() -> None:
    served = Served(replace(LIMITS, step_tokens=200))
    served.add(sequence("a", prompt=70))
    served.run()
    served.add(sequence("b", prompt=1000))
    served.step()
    (running,) = served.scheduler._running.values()
    assert (running.computed, running.cached, running.completion) == (264, 64, [])
    served.scheduler._preempt(running)
    served.step()
    assert (running.computed, running.cached) == (456, 64)
    served.run()


@pytest.mark.parametrize("wants_prompt_logits", [False, True])
def test_a_request_as_large_as_the_pool_is_served(wants_prompt_logits: bool) -> None:
    limits = replace(LIMITS, kv_blocks=7)
    most = completion_limit(limits, 20, None, voices=3)
    assert 20 + most == 2 * BLOCK
    served = Served(limits)
    versions = ("v", "expert", "anti")
    served.add(Sequence("a", versions, (7,) * 20, most, wants_prompt_logits))
    served.add(sequence("b", prompt=60, most=60))
    served.run()


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "names"),
    [(LIMITS, "context length"), (replace(LIMITS, kv_blocks=3), "ERRATA_KV_BYTES")],
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


def test_a_removed_sequence_leaves_nothing() -> None:
    scheduler = Scheduler(replace(LIMITS, max_running=1))
    scheduler.add(sequence("running"))
    scheduler.add(sequence("waiting"))
    plan = scheduler.plan()
    assert scheduler.remove("waiting") is not None
    assert scheduler.remove("running") is not None
    assert scheduler.remove("running") is None
    assert (len(scheduler), scheduler.blocks.held) == (0, 0)
    assert plan is not None
    for segment in plan.segments:  # the step was in work when they left
        scheduler.advance(segment)
    assert scheduler.plan() is None
    assert scheduler.blocks.cached == 0


# -- whatever comes -----------------------------------------------------------------------------

#: Tenant, versions, letter and length of a common beginning, tokens after it, most chosen, echo.
REQUEST = st.tuples(
    st.sampled_from(["", "else"]),
    st.sampled_from([("u",), ("v",), ("v", "u", "w"), ("v", "u", "u")]),
    st.integers(0, 1),
    st.integers(0, 3 * BLOCK),
    st.integers(1, 30),
    st.integers(0, 40),
    st.booleans(),
)


@given(
    requests=st.lists(REQUEST, max_size=12),
    gaps=st.lists(st.integers(0, 6), min_size=12, max_size=12),
    cancelled=st.sets(st.integers(0, 11), max_size=3),
    max_running=st.integers(1, 9),
    step_tokens=st.integers(16, 400),
    kv_blocks=st.integers(18, 40),
    grid=st.sampled_from([1, CHUNK]),
)
def test_every_sequence_ends_and_none_reads_anothers(
    requests: list[tuple[str, tuple[str, ...], int, int, int, int, bool]],
    gaps: list[int],
    cancelled: set[int],
    max_running: int,
    step_tokens: int,
    kv_blocks: int,
    grid: int,
) -> None:
    served = Served(Limits(max_running, 100, step_tokens, kv_blocks, 2048, grid))
    for number, (tenant, versions, letter, common, more, most, echo) in enumerate(requests):
        prompt = (letter,) * common + tuple(range(number, number + more))
        served.add(Sequence(number, versions, prompt, most, echo, tenant))
        for _ in range(gaps[number]):
            served.step()
        if number in cancelled and served.scheduler.remove(number) is not None:
            del served.sequences[number]
    served.run()


def test_the_scheduler_and_the_client_load_no_torch() -> None:
    code = (
        "import serving.scheduler, serving.client, sys;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
