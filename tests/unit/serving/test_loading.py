from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from registry.bases import Base
from registry.errors import UnsupportedModel
from registry.settings import Settings
from serving.lane import Lane
from serving.loading import CPU_KV_BYTES, load_lane
from serving.memory import keep_freed_memory
from serving.protocol import SamplingParams
from serving.scheduler import Sequence
from serving.stream import Stream

Bases = Callable[[str], Base]


def lane_of(base: Base, **settings: Any) -> Lane:
    return load_lane(base, Settings(engine_threads=1, **{"kv_bytes": 2**21, **settings}))


def greedy(lane: Lane, count: int = 8) -> list[int]:
    params = SamplingParams(temperature=0, ignore_eos=True)
    sequence = Sequence("a", ("v",), (5, 6, 7), count)
    assert lane.add(Stream(sequence, params, ({},), lane.decoder, lane.eos)) == []
    found: list[int] = []
    while len(lane):
        for output in lane.step():
            assert output.piece is not None
            found += output.piece.tokens
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prepacked_weights_choose_the_same_tokens(saved: Bases, family: str) -> None:
    plain, packed = (lane_of(saved(family), prepack=prepack) for prepack in (False, True))
    assert greedy(plain) == greedy(packed)


def test_auto_is_a_gpu_only_where_there_is_one(saved: Bases) -> None:
    found = lane_of(saved("llama"), device="auto").runner.device.type
    assert found == ("cuda" if torch.cuda.is_available() else "cpu")
    assert lane_of(saved("llama"), device="cpu").runner.device.type == "cpu"


def test_a_gpu_that_is_not_there_is_refused_by_name(saved: Bases) -> None:
    device = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(UnsupportedModel, match=f"ERRATA_DEVICE={device}.*no GPU"):
        lane_of(saved("llama"), device=device)


@pytest.mark.parametrize("invariant", [False, True])
def test_bfloat16_serves(saved: Bases, invariant: bool) -> None:
    lane = lane_of(saved("llama"), dtype="bfloat16", batch_invariant=invariant)
    assert lane.status().dtype == "bfloat16"
    assert lane.runner.pool.layer(0)[0].dtype == torch.bfloat16
    assert len(greedy(lane)) == 8


def test_keys_and_values_take_the_memory_that_the_setting_says(saved: Bases) -> None:
    lane = lane_of(saved("llama"), device="cpu")
    keys, values = lane.runner.pool.layer(1)
    assert 2 * (keys.nbytes + values.nbytes) == 2**21
    assert lane.status().kv_tokens == keys.shape[0] * keys.shape[2]
    unset = lane_of(saved("llama"), device="cpu", kv_bytes=None)
    keys, _ = unset.runner.pool.layer(0)
    assert 4 * keys.nbytes == CPU_KV_BYTES


@pytest.mark.parametrize("kv_bytes", [2**10, 2**16])
def test_too_little_memory_for_keys_and_values_is_refused(saved: Bases, kv_bytes: int) -> None:
    """For not one block, and for fewer than the self-test needs."""
    with pytest.raises(UnsupportedModel, match="ERRATA_KV_BYTES"):
        lane_of(saved("llama"), kv_bytes=kv_bytes)


def test_the_default_claims_no_batch_invariance(saved: Bases) -> None:
    assert not lane_of(saved("llama")).status().batch_invariant
    lane = lane_of(saved("llama"), batch_invariant=True, device="cpu")
    assert lane.status().batch_invariant
    assert lane.scheduler.limits.grid > 1


def test_freed_memory_may_be_kept_twice() -> None:
    keep_freed_memory()
    keep_freed_memory()
    assert torch.ones(2**20).sum() == 2**20
