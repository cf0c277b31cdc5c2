from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import pytest
import torch

from editing.deltas import Effect
from editing.models.loading import weights_digest
from registry.bases import Base
from registry.errors import ErrataError, InvalidRequest, TooManyRequests
from registry.settings import Settings
from serving.engine import Engine
from serving.lane import Lane, Output
from serving.loading import load_lane
from serving.protocol import Grammar, Piece, SamplingParams
from serving.sampling import Choice
from serving.scheduler import Sequence
from serving.stream import Stream
from tests.models import random_effect, random_model
from tests.unit.serving.packing import plain_logits

PATH = "model.layers.1.mlp.down_proj"


class Lost(torch.Tensor):
    """On a device that answers no more."""

    @classmethod
    def __torch_function__(cls, *_: object, **__: object) -> object:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")


VERSIONS: Mapping[str, Mapping[str, Effect]] = {
    "base": {},
    "low-rank": {PATH: random_effect(1, 64, 96, "rank3")},
    "dense": {PATH: random_effect(2, 64, 96, "dense")},
    "scale": {PATH: random_effect(3, 64, 96, "scale")},
    # what the loader refuses, to see what a step does about it
    "misshapen": {PATH: Effect(dense=torch.zeros(3, 3))},
    "infinite": {PATH: Effect(dense=torch.full((64, 96), 3e38))},
    "lost": {PATH: Effect(dense=torch.zeros(64, 96).as_subclass(Lost))},
}
GREEDY = SamplingParams(temperature=0, ignore_eos=True, logprobs=2)


#: Of a block of the small base: two layers' keys and values of two heads of 16 numbers.
BLOCK_BYTES = 2 * 2 * 2 * 16 * 32 * 4


def lane_of(base: Base, **settings: Any) -> Lane:
    settings = {"kv_bytes": 128 * BLOCK_BYTES, "step_tokens": 64, "max_running": 16, **settings}
    return load_lane(base, Settings(engine_threads=1, device="cpu", **settings))


@pytest.fixture(params=[False, True], ids=["default", "invariant"])
def lane(saved: Callable[[str], Base], request: pytest.FixtureRequest) -> Lane:
    lane = lane_of(saved("llama"), batch_invariant=request.param)
    assert lane.batch_invariant == request.param
    return lane


def stream(
    lane: Lane,
    key: Hashable,
    *versions: str,
    prompt: tuple[int, ...] = (5, 6, 7, 8),
    params: SamplingParams = GREEDY,
    most: int = 12,
    alpha: float = 0.0,
) -> Stream:
    versions = versions or ("base",)
    sequence = Sequence(key, versions, prompt, most)
    effects = tuple(VERSIONS[version] for version in versions)
    return Stream(sequence, params, effects, lane.decoder, lane.eos, alpha=alpha)


def run(lane: Lane, *streams: Stream) -> dict[Hashable, list[Output]]:
    """Everything the streams get, all of them begun at once."""
    outputs = [output for each in streams for output in lane.add(each)]
    while len(lane):
        outputs += lane.step()
    found: dict[Hashable, list[Output]] = {each.key: [] for each in streams}
    for output in outputs:
        found[output.key].append(output)
    return found


def pieces(outputs: list[Output]) -> list[Piece]:
    assert [output.ends for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert all(output.piece is not None for output in outputs)
    return [output.piece for output in outputs if output.piece is not None]


def tokens(outputs: list[Output]) -> list[int]:
    return [token for piece in pieces(outputs) for token in piece.tokens]


def assert_same(lane: Lane, found: list[Output], expected: list[Output]) -> None:
    """Equal text and tokens; log-probabilities too, to the last bit where the lane promises it."""
    for own, other in zip(pieces(found), pieces(expected), strict=True):
        assert (own.text, own.tokens, own.finish_reason) == (
            other.text,
            other.tokens,
            other.finish_reason,
        )
        if lane.batch_invariant:
            assert own.logprobs == other.logprobs
            continue
        for entry, wanted in zip(own.logprobs or (), other.logprobs or (), strict=True):
            assert entry.logprob == pytest.approx(wanted.logprob, abs=1e-4)


def test_streams_of_many_versions_get_what_they_get_alone(lane: Lane) -> None:
    before = weights_digest(lane.runner.model)
    chosen = ["base", "low-rank", "dense", "scale"]

    def streams() -> list[Stream]:
        return [
            stream(lane, n, chosen[n % 4], prompt=tuple(range(n % 5, n % 5 + 2 + 9 * n)))
            for n in range(12)
        ]

    together = run(lane, *streams())
    for each in streams():
        assert_same(lane, run(lane, each)[each.key], together[each.key])
    firsts = [tokens(run(lane, stream(lane, 0, version))[0]) for version in chosen]
    assert len({tuple(first) for first in firsts}) == 4, "versions must differ"
    assert weights_digest(lane.runner.model) == before
    assert (lane.scheduler.running, lane.scheduler.blocks.held) == (0, 0)


def test_a_prefix_hit_gives_the_same_tokens_and_is_told(lane: Lane) -> None:
    prompt = tuple(range(170))  # on the lane's grid blocks are shared by 160 tokens
    first = run(lane, stream(lane, "a", "low-rank", prompt=prompt))["a"]
    again = run(lane, stream(lane, "a", "low-rank", prompt=prompt))["a"]
    assert_same(lane, again, first)
    assert [cached(outputs) for outputs in (first, again)] == [0, 160]
    assert lane.cached_tokens == 160
    assert lane.status().kv_cached >= 160
    other = run(lane, stream(lane, "a", "dense", prompt=prompt))["a"]
    assert cached(other) == 0
    assert tokens(other) != tokens(first)


def cached(outputs: list[Output]) -> int:
    usage = pieces(outputs)[-1].usage
    assert usage is not None
    return usage.cached_tokens


def test_preempted_streams_get_the_tokens_that_they_would_get_in_a_larger_pool(
    lane: Lane, saved: Callable[[str], Base]
) -> None:
    small = lane_of(saved("llama"), kv_bytes=16 * BLOCK_BYTES, batch_invariant=lane.batch_invariant)

    def streams() -> list[Stream]:
        return [
            stream(lane, n, ("base", "dense")[n % 2], prompt=tuple(range(n, 2 * n + 20)), most=100)
            for n in range(8)
        ]

    expected, found = run(lane, *streams()), run(small, *streams())
    assert (lane.scheduler.preempted, small.scheduler.preempted > 3) == (0, True)
    assert small.status().preempted == small.scheduler.preempted
    for key, outputs in found.items():
        assert_same(lane, outputs, expected[key])
        assert cached(outputs) == 0


def test_three_voices_are_combined(lane: Lane) -> None:
    """As three models would be, one after the other, each over the whole text at every token."""
    versions = ("base", "low-rank", "scale")
    proxy = stream(lane, "proxy", *versions, alpha=0.7)
    found = tokens(run(lane, *(stream(lane, n, n) for n in versions), proxy)["proxy"])
    model, text = random_model("llama"), [5, 6, 7, 8]
    for token in found:
        rows = [plain_logits(model, text, VERSIONS[version])[-1] for version in versions]
        assert token == int((rows[0] + 0.7 * (rows[1] - rows[2])).argmax())
        text.append(token)
    assert len(found) == 12
    assert found != tokens(run(lane, stream(lane, "a", "base"))["a"])
    assert lane.scheduler.blocks.held == 0


def test_an_expert_that_is_the_anti_expert_changes_nothing(lane: Lane) -> None:
    proxy = stream(lane, "proxy", "base", "dense", "dense", alpha=2.0)
    assert_same(lane, run(lane, proxy)["proxy"], run(lane, stream(lane, "a"))["a"])


def test_a_request_of_three_voices_may_fill_the_pool(saved: Callable[[str], Base]) -> None:
    lane = lane_of(saved("llama"), kv_bytes=16 * BLOCK_BYTES)
    proxy = stream(lane, "proxy", "base", "dense", "scale", most=156, alpha=1.0)
    assert len(tokens(run(lane, proxy, stream(lane, "a", most=200))["proxy"])) == 156
    (refused,) = lane.add(stream(lane, "proxy", "base", "dense", "scale", most=157))
    assert refused.error is not None
    assert refused.error.code == "context_length_exceeded"


def test_a_completion_ends_at_its_length_with_its_usage(lane: Lane) -> None:
    found = pieces(run(lane, stream(lane, "a", most=5))["a"])
    assert [len(piece.tokens) for piece in found] == [1] * 5
    assert found[-1].finish_reason == "length"
    assert found[-1].usage is not None
    assert (found[-1].usage.prompt_tokens, found[-1].usage.completion_tokens) == (4, 5)
    assert (lane.prompt_tokens, lane.completion_tokens) == (4, 5)
    text = "".join(piece.text for piece in found)
    assert text == lane.decoder.decode([token for piece in found for token in piece.tokens])


def test_a_completion_ends_before_a_stop_string(lane: Lane) -> None:
    whole = "".join(piece.text for piece in pieces(run(lane, stream(lane, "a"))["a"]))
    stop = whole[3:6]
    params = SamplingParams(temperature=0, ignore_eos=True, stop=(stop,))
    found = pieces(run(lane, stream(lane, "a", params=params))["a"])
    assert "".join(piece.text for piece in found) == whole[: whole.index(stop)]
    assert found[-1].finish_reason == "stop"


def test_an_end_of_sequence_token_ends_a_completion_and_is_not_in_it(lane: Lane) -> None:
    whole = tokens(run(lane, stream(lane, "a"))["a"])
    place = max(whole.index(token) for token in whole)  # of a token not seen before it
    lane.eos = frozenset({whole[place]})
    params = SamplingParams(temperature=0)
    found = run(lane, stream(lane, "a", params=params))["a"]
    assert tokens(found) == whole[:place]
    last = pieces(found)[-1]
    assert (last.finish_reason, last.tokens) == ("stop", ())
    assert last.usage is not None
    assert last.usage.completion_tokens == place


def test_a_seeded_sample_repeats_in_any_company(lane: Lane) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=5, ignore_eos=True)
    alone = tokens(run(lane, stream(lane, "a", params=params))["a"])
    others = [
        stream(lane, n, "dense", params=SamplingParams(seed=n, ignore_eos=True)) for n in range(6)
    ]
    together = run(lane, *others, stream(lane, "a", params=params))
    assert tokens(together["a"]) == alone
    assert len({tuple(tokens(together[n])) for n in range(6)}) == 6


@pytest.mark.parametrize(
    ("bad", "code"), [("misshapen", "internal_error"), ("infinite", "not_finite")]
)
def test_a_bad_version_fails_alone(lane: Lane, bad: str, code: str) -> None:
    """And with it only those that it is a voice of."""

    def good() -> list[Stream]:
        proxy = stream(lane, "proxy", "base", "dense", "scale", alpha=0.5)
        singles = [stream(lane, version, version) for version in ("base", "low-rank", "scale")]
        return [*singles, proxy]

    expected = {each.key: run(lane, each)[each.key] for each in good()}
    ill = [stream(lane, "bad", bad), stream(lane, "bad voice", "base", bad, "scale", alpha=0.5)]
    first, *rest = good()
    together = run(lane, first, *ill, *rest)
    for key in ("bad", "bad voice"):
        (failure,) = together.pop(key)
        assert isinstance(failure.error, ErrataError)
        assert (failure.error.status, failure.error.code) == (500, code)
    assert together.keys() == expected.keys()
    for key, outputs in together.items():
        assert_same(lane, outputs, expected[key])
    assert lane.scheduler.blocks.held == 0


@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_bad_request_fails_alone_among_its_versions(lane: Lane, place: int) -> None:
    def good() -> list[Stream]:
        return [stream(lane, n, "low-rank", prompt=(n, n + 1)) for n in range(4)]

    expected = run(lane, *good())
    bad = stream(lane, "bad", "low-rank", prompt=(5, 10**6))  # what the front refuses
    streams = good()
    together = run(lane, *streams[:place], bad, *streams[place:])
    (failure,) = together.pop("bad")
    assert failure.error is not None
    assert failure.error.status == 500
    for key, outputs in together.items():
        assert_same(lane, outputs, expected[key])
    assert lane.scheduler.blocks.held == 0


def test_a_grammar_that_cannot_be_followed_further_ends_its_stream_with_the_reason(
    lane: Lane,
) -> None:
    sequence, guide = Sequence("a", ("base",), (5,), 9), lane.guides.guide(Grammar("regex", "a"))
    guided = Stream(sequence, GREEDY, ({},), lane.decoder, lane.eos, guide=guide)
    lane.add(guided)
    lane.scheduler.plan()
    output = lane._advance(guided, Choice(6))
    assert isinstance(output.error, InvalidRequest)
    assert "response_format" in output.error.message
    assert (lane.scheduler.blocks.held, len(lane)) == (0, 0)


def test_a_request_for_which_the_queue_has_no_place_is_told_when_to_come_back(
    saved: Callable[[str], Base],
) -> None:
    """However it came past the front, which counts only those that it still has."""
    lane = lane_of(saved("llama"), max_waiting=2)
    found = run(lane, *(stream(lane, n) for n in range(3)))
    (refusal,) = found.pop(2)
    assert isinstance(refusal.error, TooManyRequests)
    assert "2 requests wait for base 'llama' already" in refusal.error.message
    assert (refusal.error.code, refusal.error.retry_after) == ("engine_full", 1)
    assert [len(tokens(outputs)) for outputs in found.values()] == [12, 12]


def test_a_cancelled_stream_frees_its_blocks_at_once(lane: Lane) -> None:
    lane.add(stream(lane, "a", prompt=tuple(range(40)), most=100))
    lane.step()
    assert lane.scheduler.blocks.held == 2
    assert [output.ends for output in lane.cancel("a")] == [True]
    assert (lane.scheduler.blocks.held, len(lane)) == (0, 0)
    assert lane.cancel("a") == []
    assert lane.step() == []


def test_the_engine_outlives_a_step_that_nothing_explains(lane: Lane) -> None:
    outputs: list[Output] = []
    engine = Engine([lane], outputs.extend)
    broken = stream(lane, "broken")
    broken.sequence.prompt = None  # type: ignore[assignment]
    lane._streams["broken"] = broken  # planning will fail on it
    lane.scheduler._waiting.append(broken.sequence)
    engine.submit(lane, stream(lane, "beside"))
    engine.stop()
    engine.run()  # only takes orders
    lane_outputs = engine._step(lane)
    assert {output.key for output in lane_outputs} == {"broken", "beside"}
    assert all(output.error is not None for output in lane_outputs)
    assert len(tokens(run(lane, stream(lane, "later"))["later"])) == 12


def test_a_step_whose_device_answers_no_more_ends_the_engine(lane: Lane) -> None:
    """Each later step would fail too; a process that is started anew has the device back."""
    engine = Engine([lane], lambda _: None)
    lane.add(stream(lane, "beside"))
    lane.add(stream(lane, "lost", "lost"))
    with pytest.raises(torch.AcceleratorError):
        engine._step(lane)
