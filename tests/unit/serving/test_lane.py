from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

import pytest
import torch

from editing.deltas import Effect
from editing.models.loading import weights_digest
from registry.bases import Base
from registry.errors import ErrataError
from registry.settings import Settings
from serving.engine import Engine
from serving.lane import Lane, Output
from serving.loading import load_lane
from serving.protocol import Piece, SamplingParams
from serving.scheduler import Sequence
from serving.stream import Stream
from tests.models import random_effect

PATH = "model.layers.1.mlp.down_proj"
VERSIONS: Mapping[str, Mapping[str, Effect]] = {
    "base": {},
    "low-rank": {PATH: random_effect(1, 64, 96, "rank3")},
    "dense": {PATH: random_effect(2, 64, 96, "dense")},
    "scale": {PATH: random_effect(3, 64, 96, "scale")},
    # what the loader refuses, to see what a step does about it
    "misshapen": {PATH: Effect(dense=torch.zeros(3, 3))},
    "infinite": {PATH: Effect(dense=torch.full((64, 96), 3e38))},
}
GREEDY = SamplingParams(temperature=0, ignore_eos=True, logprobs=2)


@pytest.fixture
def lane(saved: Callable[[str], Base]) -> Lane:
    return load_lane(
        saved("llama"), Settings(kv_tokens=4000, step_tokens=64, max_running=16, engine_threads=1)
    )


def stream(
    lane: Lane,
    key: Hashable,
    version: str = "base",
    prompt: tuple[int, ...] = (5, 6, 7, 8),
    params: SamplingParams = GREEDY,
    most: int = 12,
) -> Stream:
    sequence = Sequence(key, version, prompt, most)
    return Stream(sequence, params, VERSIONS[version], lane.decoder, lane.eos)


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


def test_streams_of_many_versions_get_what_they_get_alone(lane: Lane) -> None:
    before = weights_digest(lane.runner.model)
    chosen = ["base", "low-rank", "dense", "scale"]

    def streams() -> list[Stream]:
        return [
            stream(lane, n, chosen[n % 4], tuple(range(n % 5, n % 5 + 2 + 9 * n)))
            for n in range(12)
        ]

    together = run(lane, *streams())
    for each in streams():
        alone = run(lane, each)[each.key]
        assert pieces(alone) == pieces(together[each.key]), "text, tokens and log-probabilities"
    firsts = [tokens(run(lane, stream(lane, 0, version))[0]) for version in chosen]
    assert len({tuple(first) for first in firsts}) == 4, "versions must differ"
    assert weights_digest(lane.runner.model) == before
    assert (lane.scheduler.running, lane.scheduler.spans.used) == (0, 0)


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
    good = [stream(lane, version, version) for version in ("base", "low-rank", "scale")]
    expected = {each.key: run(lane, each)[each.key] for each in good}
    good = [stream(lane, version, version) for version in ("base", "low-rank", "scale")]
    together = run(lane, *good[:2], stream(lane, "bad", bad), good[2])
    (failure,) = together.pop("bad")
    assert isinstance(failure.error, ErrataError)
    assert (failure.error.status, failure.error.code) == (500, code)
    for key, outputs in together.items():
        assert pieces(outputs) == pieces(expected[key])
    assert lane.scheduler.spans.used == 0


def test_a_cancelled_stream_frees_its_slots_at_once(lane: Lane) -> None:
    lane.add(stream(lane, "a", most=100))
    lane.step()
    assert lane.scheduler.spans.used == 104
    assert [output.ends for output in lane.cancel("a")] == [True]
    assert (lane.scheduler.spans.used, len(lane)) == (0, 0)
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
