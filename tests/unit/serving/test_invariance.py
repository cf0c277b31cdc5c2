"""In the invariant mode no bit of an answer depends on what else is computed, or on what was.

A GPU's products do not offer that, and its status says so: these run on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest

from registry.bases import Base
from registry.settings import Settings
from serving.lane import Lane
from serving.loading import load_lane
from serving.protocol import SamplingParams, TokenLogprob
from serving.scheduler import CHUNK, Sequence
from serving.stream import Stream
from serving.versions import Effects
from tests.models import random_effect

PATHS = {"model.layers.0.self_attn.k_proj": (32, 64), "model.layers.1.mlp.down_proj": (64, 96)}
KINDS = ("rank1", "rank3", "dense", "sparse", "scale", "gated")
VERSIONS: dict[str, Effects] = {
    "base": {},
    **{
        kind: {path: random_effect(n, *shape, kind) for path, shape in PATHS.items()}
        for n, kind in enumerate(KINDS)
    },
}
#: Every token's log-probability, as it comes from the logits, and those of two more.
PARAMS = SamplingParams(temperature=0, ignore_eos=True, logprobs=2)

Bits = list[tuple[TokenLogprob, ...]]
#: A tenant for whom nothing is in the prefix cache.
NEW_TENANTS = map(str, count())


def lane_of(base: Base, kv_bytes: int = 2**25) -> Lane:
    settings = Settings(
        engine_threads=1,
        device="cpu",
        batch_invariant=True,
        max_running=64,
        step_tokens=1600,
        kv_bytes=kv_bytes,
    )
    lane = load_lane(base, settings)
    assert lane.batch_invariant
    return lane


@pytest.fixture(scope="module")
def lane(saved: Callable[[str], Base]) -> Lane:
    return lane_of(saved("llama"))


def stream_of(lane: Lane, key: int, versions: tuple[str, ...], length: int, tenant: str) -> Stream:
    prompt = tuple((7 * key + 3 * n) % 300 for n in range(length))
    effects = tuple(VERSIONS[version] for version in versions)
    sequence = Sequence(key, versions, prompt, 10, tenant=tenant)
    return Stream(sequence, PARAMS, effects, lane.decoder, lane.eos, alpha=0.5)


def crowd(lane: Lane, many: int, tenant: str | None = None) -> list[Stream]:
    """Prompts shorter than a chunk, of a chunk and longer, of all versions; proxies among them."""
    tenant = next(NEW_TENANTS) if tenant is None else tenant
    names = list(VERSIONS)
    lengths = (1, 5, 31, 33, 70, CHUNK, CHUNK + 40, 2)
    return [
        stream_of(
            lane,
            key,
            ("base", "rank3", "dense") if key % 7 == 3 else (names[key % len(names)],),
            lengths[key % len(lengths)],
            tenant,
        )
        for key in range(many)
    ]


def run(lane: Lane, *streams: Stream) -> dict[object, Bits]:
    found: dict[object, Bits] = {stream.key: [] for stream in streams}
    assert not [output for stream in streams for output in lane.add(stream)]
    while len(lane):
        for output in lane.step():
            assert output.piece is not None
            found[output.key].append(output.piece.logprobs or ())
    return found


@pytest.fixture(scope="module")
def alone(saved: Callable[[str], Base]) -> dict[object, Bits]:
    """What each gets when it is the first and only one."""
    lane = lane_of(saved("llama"))
    found: dict[object, Bits] = {}
    for stream in crowd(lane, 64):
        found |= run(lane, stream)
    return found


@pytest.mark.parametrize("many", [2, 17, 64])
def test_bits_are_the_same_in_any_company(lane: Lane, alone: dict[object, Bits], many: int) -> None:
    for key, bits in run(lane, *crowd(lane, many)).items():
        assert bits == alone[key], key


def test_bits_are_the_same_after_a_prefix_hit(lane: Lane, alone: dict[object, Bits]) -> None:
    hits = lane.cached_tokens
    for _ in range(2):
        for key, bits in run(lane, *crowd(lane, 16, "again")).items():
            assert bits == alone[key], key
    assert lane.cached_tokens - hits == 2 * CHUNK, "two prompts are longer than a chunk"


def test_bits_are_the_same_after_a_preemption(
    saved: Callable[[str], Base], alone: dict[object, Bits]
) -> None:
    small = lane_of(saved("llama"), kv_bytes=2**19)  # 32 blocks
    for key, bits in run(small, *crowd(small, 64)).items():
        assert bits == alone[key], key
    assert small.scheduler.preempted
