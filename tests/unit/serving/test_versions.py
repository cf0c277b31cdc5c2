from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from editing.deltas import Effect, compose
from editing.models.loading import load_model
from registry.artifacts import ArtifactStore
from registry.bases import Base
from registry.errors import VersionUnavailable
from serving.protocol import VersionRef
from serving.versions import Versions
from tests.models import random_effect, store_version

PATH = "model.layers.1.mlp.down_proj"


def deltas(*seeds: int) -> list[dict[str, Effect]]:
    return [{PATH: random_effect(seed, 64, 96, "rank3")} for seed in seeds]


@pytest.fixture
def base(saved: Callable[[str], Base]) -> Base:
    return saved("llama")


@pytest.fixture(scope="module")
def model(saved: Callable[[str], Base]) -> PreTrainedModel:
    return load_model(saved("llama"))


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


def refused(store: ArtifactStore, ref: VersionRef, base: Base, model: PreTrainedModel) -> str:
    with pytest.raises(VersionUnavailable) as caught:
        asyncio.run(Versions(store).acquire(ref, base, model))
    assert ref.id in caught.value.message
    return caught.value.message


def test_a_stack_is_composed_in_order(
    store: ArtifactStore, base: Base, model: PreTrainedModel
) -> None:
    stack = deltas(1, 2)
    ref = store_version(store, base, *stack)

    async def run() -> None:
        versions = Versions(store)
        effects = await versions.acquire(ref, base, model)
        expected = compose(stack)
        for part, tensor in effects[PATH].parts().items():
            assert torch.equal(tensor, expected[PATH].parts()[part])
        assert await versions.acquire(ref, base, model) is effects, "loaded once"
        (listed,) = versions.listed()
        assert (listed.stack_digest, listed.depth, listed.requests) == (ref.stack_digest, 2, 2)
        assert listed.nbytes == effects[PATH].nbytes

    asyncio.run(run())


def test_the_base_itself_is_a_version(
    store: ArtifactStore, base: Base, model: PreTrainedModel
) -> None:
    ref = store_version(store, base)
    assert asyncio.run(Versions(store).acquire(ref, base, model)) == {}


def test_what_is_missing_damaged_or_not_for_this_base_is_refused(
    store: ArtifactStore, base: Base, model: PreTrainedModel, tmp_path: Path
) -> None:
    missing = store_version(store, base, *deltas(1))
    file = tmp_path / missing.stack[0][:2] / missing.stack[0]
    data = bytearray(file.read_bytes())
    file.unlink()
    assert "not in the store" in refused(store, missing, base, model)
    data[-1] ^= 1
    file.write_bytes(data)
    assert "digest" in refused(store, missing, base, model)

    foreign = store_version(store, base, *deltas(2), base_digest="f" * 64)
    assert "f" * 64 in refused(store, foreign, base, model)
    elsewhere = store_version(store, base, {"model.layers.7.mlp": Effect(shift=torch.ones(64))})
    assert "model.layers.7.mlp" in refused(store, elsewhere, base, model)
    shapes = store_version(store, base, {PATH: Effect(dense=torch.ones(96, 64))})
    assert "(96, 64)" in refused(store, shapes, base, model)
    text = store.put(b"no delta at all")
    forged = VersionRef("ver_x", base.name, (text,), "0" * 64)
    assert "another base" in refused(store, forged, base, model)


def test_a_version_that_failed_can_be_had_when_its_delta_is_back(
    store: ArtifactStore, base: Base, model: PreTrainedModel, tmp_path: Path
) -> None:
    ref = store_version(store, base, *deltas(1))
    file = tmp_path / ref.stack[0][:2] / ref.stack[0]
    data = file.read_bytes()
    file.unlink()

    async def run() -> None:
        versions = Versions(store)
        with pytest.raises(VersionUnavailable):
            await versions.acquire(ref, base, model)
        file.write_bytes(data)
        assert PATH in await versions.acquire(ref, base, model)

    asyncio.run(run())


def resident(versions: Versions) -> list[str]:
    return [version.stack_digest for version in versions.listed()]


async def settled() -> None:
    """Let everything that can go on go on: threads too."""
    for _ in range(20):
        await asyncio.sleep(0.005)


SIZE = deltas(1)[0][PATH].nbytes


def test_the_least_recently_used_leaves_when_its_room_is_needed(
    store: ArtifactStore, base: Base, model: PreTrainedModel
) -> None:
    refs = [store_version(store, base, *deltas(seed)) for seed in (1, 2, 3)]
    first, second, third = (ref.stack_digest for ref in refs)

    async def run() -> None:
        versions = Versions(store, resident_bytes=2 * SIZE)
        for ref in (refs[0], refs[1], refs[0]):
            await versions.acquire(ref, base, model)
            versions.release(ref.stack_digest)
        assert resident(versions) == [second, first]
        await versions.warm(refs[2], base, model)
        assert resident(versions) == [first, third]
        assert all(version.requests == 0 for version in versions.listed())

    asyncio.run(run())


def test_what_does_not_fit_waits_in_turn_for_what_is_held(
    store: ArtifactStore, base: Base, model: PreTrainedModel
) -> None:
    refs = [store_version(store, base, *deltas(seed)) for seed in (1, 2, 3, 4)]
    digests = [ref.stack_digest for ref in refs]
    untouched = store_version(store, base)

    async def run() -> None:
        versions = Versions(store, resident_bytes=2 * SIZE)
        for ref in refs[:2]:
            await versions.acquire(ref, base, model)
        third, fourth = (
            asyncio.create_task(versions.acquire(ref, base, model)) for ref in refs[2:]
        )
        await settled()
        assert resident(versions) == digests[:2]
        assert await versions.acquire(untouched, base, model) == {}, "needs no room"
        await versions.acquire(refs[0], base, model)
        versions.release(digests[1])
        await settled()
        assert third.done()
        assert not fourth.done()
        versions.release(digests[0])
        await settled()
        assert not fourth.done(), "another request holds it yet"
        versions.release(digests[0])
        await asyncio.wait_for(fourth, 10)
        assert digests[0] not in resident(versions)

    asyncio.run(run())


def test_who_gives_up_waiting_stands_in_nobodys_way(
    store: ArtifactStore, base: Base, model: PreTrainedModel
) -> None:
    big = store_version(store, base, {PATH: random_effect(1, 64, 96, "dense")})
    held, small = (store_version(store, base, *deltas(seed)) for seed in (1, 2))
    room = random_effect(1, 64, 96, "dense").nbytes

    async def run() -> None:
        versions = Versions(store, resident_bytes=room)
        await versions.acquire(held, base, model)
        waiting = asyncio.create_task(versions.acquire(big, base, model))
        behind = asyncio.create_task(versions.acquire(small, base, model))
        await settled()
        assert not behind.done()
        waiting.cancel()
        await asyncio.wait_for(behind, 10)
        assert resident(versions) == [held.stack_digest, small.stack_digest]
        versions.release(held.stack_digest)
        versions.release(small.stack_digest)
        await asyncio.wait_for(versions.acquire(big, base, model), 10)

    asyncio.run(run())


def test_what_is_larger_than_all_room_is_refused(
    store: ArtifactStore, base: Base, model: PreTrainedModel
) -> None:
    large = store_version(store, base, *deltas(1))
    small = store_version(store, base, {PATH: Effect(shift=torch.ones(64))})

    async def run() -> None:
        versions = Versions(store, resident_bytes=SIZE - 1)
        with pytest.raises(VersionUnavailable, match="ERRATA_RESIDENT_BYTES"):
            await versions.acquire(large, base, model)
        assert PATH in await versions.acquire(small, base, model)

    asyncio.run(run())


def test_a_stack_that_overflows_is_refused(
    store: ArtifactStore, base: Base, model: PreTrainedModel
) -> None:
    huge = {PATH: Effect(scale=torch.full((64,), 3e38), shift=torch.full((64,), 3e38))}
    assert "not finite" in refused(store, store_version(store, base, huge, huge), base, model)


def test_what_left_the_device_is_found_in_host_memory(
    store: ArtifactStore, base: Base, model: PreTrainedModel, tmp_path: Path
) -> None:
    refs = [store_version(store, base, *deltas(seed)) for seed in (1, 2, 3)]

    async def run() -> None:
        counting = SlowStore(tmp_path)
        versions = Versions(counting, resident_bytes=SIZE, host_bytes=2 * SIZE)
        for ref, reads in ((0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):
            await versions.warm(refs[ref], base, model)
            assert counting.reads == reads
            assert resident(versions) == [refs[ref].stack_digest]

    asyncio.run(run())


def test_many_versions_cost_their_tensors(
    store: ArtifactStore, base: Base, model: PreTrainedModel
) -> None:
    """Storages are exactly as large as what they hold, and nobody shares one."""
    refs = [
        store_version(store, base, {PATH: random_effect(seed, 64, 96, "rank1")})
        for seed in range(8)
    ]

    async def run() -> None:
        versions = Versions(store)
        parts = [
            part
            for ref in refs
            for part in (await versions.acquire(ref, base, model))[PATH].parts().values()
        ]
        storages = {part.untyped_storage().data_ptr(): part.untyped_storage() for part in parts}
        held = sum(storage.nbytes() for storage in storages.values())
        assert len(storages) == len(parts)
        assert held == 8 * 4 * (64 + 96) == sum(version.nbytes for version in versions.listed())

    asyncio.run(run())


class SlowStore(ArtifactStore):
    """A store on a slow disk that counts who reads."""

    reads: int = 0

    def get(self, digest: str) -> bytes:
        self.reads += 1
        assert threading.current_thread() is not threading.main_thread()
        time.sleep(0.2)
        return super().get(digest)


def test_loading_stalls_nobody_and_happens_once(
    store: ArtifactStore, base: Base, model: PreTrainedModel, tmp_path: Path
) -> None:
    ref = store_version(store, base, *deltas(1))

    async def run() -> None:
        slow = SlowStore(tmp_path)
        versions = Versions(slow)
        given_up = asyncio.create_task(versions.acquire(ref, base, model))
        waiting = [asyncio.create_task(versions.acquire(ref, base, model)) for _ in range(3)]
        ticks = 0
        while not waiting[-1].done():
            await asyncio.sleep(0.01)
            ticks += 1
            if ticks == 2:
                given_up.cancel()
        assert ticks > 8, "the loop was free"
        assert slow.reads == 1
        await asyncio.gather(*waiting)
        assert versions.listed()[0].requests == 3, "who gave up holds nothing"

    asyncio.run(run())
