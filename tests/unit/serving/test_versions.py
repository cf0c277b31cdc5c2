from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import serving.versions
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
        versions = Versions(store, resident_bytes=2 * SIZE, host_bytes=4 * SIZE)
        for ref in refs:
            await versions.warm(ref, base, model)
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
        returned = asyncio.create_task(versions.acquire(refs[1], base, model))
        await asyncio.wait_for(third, 10)
        assert not returned.done(), "who waited has the room, not who asked at once"
        assert not fourth.done()
        versions.release(digests[0])
        await settled()
        assert not fourth.done(), "another request holds it yet"
        versions.release(digests[0])
        await asyncio.wait_for(fourth, 10)
        assert not returned.done()
        versions.release(digests[2])
        await asyncio.wait_for(returned, 10)
        assert set(resident(versions)) == {untouched.stack_digest, digests[1], digests[3]}

    asyncio.run(run())


def test_who_finds_no_room_is_told_in_time_and_lets_others_pass(
    store: ArtifactStore,
    base: Base,
    model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A version that needs all the room, while requests for others overlap, never has it."""
    monkeypatch.setattr(serving.versions, "ROOM_SECONDS", 2.0)
    large = store_version(store, base, {PATH: random_effect(1, 64, 96, "dense")})
    held, small = (store_version(store, base, *deltas(seed)) for seed in (1, 2))

    async def run() -> None:
        versions = Versions(store, resident_bytes=random_effect(1, 64, 96, "dense").nbytes)
        await versions.acquire(held, base, model)
        waiting = [asyncio.create_task(versions.acquire(large, base, model)) for _ in range(3)]
        await settled()
        await versions.acquire(small, base, model)
        await versions.acquire(held, base, model)
        versions.release(held.stack_digest)
        assert not any(task.done() for task in waiting), "the others did not wait for them"
        for task in waiting:
            with pytest.raises(VersionUnavailable, match="ERRATA_RESIDENT_BYTES") as caught:
                await asyncio.wait_for(task, 10)
            assert caught.value.retry_after is not None
        assert [(v.stack_digest, v.requests) for v in versions.listed()] == [
            (small.stack_digest, 1),
            (held.stack_digest, 1),
        ]
        for ref in (held, small):
            versions.release(ref.stack_digest)
        await versions.acquire(large, base, model)

    asyncio.run(run())


def test_who_gives_up_waiting_holds_nothing(
    store: ArtifactStore, base: Base, model: PreTrainedModel
) -> None:
    held, other = (store_version(store, base, *deltas(seed)) for seed in (1, 2))

    async def run() -> None:
        versions = Versions(store, resident_bytes=SIZE)
        await versions.acquire(held, base, model)
        early, late, last = (
            asyncio.create_task(versions.acquire(other, base, model)) for _ in range(3)
        )
        await settled()
        early.cancel()
        versions.release(held.stack_digest)
        late.cancel()  # who has the room already, and was not told yet
        await asyncio.wait_for(last, 10)
        await settled()
        assert [version.requests for version in versions.listed()] == [1]
        versions.release(other.stack_digest)
        await versions.acquire(held, base, model)

    asyncio.run(run())


def test_nobody_leaves_for_a_version_that_finds_no_room_even_so(
    store: ArtifactStore, base: Base, model: PreTrainedModel
) -> None:
    large = store_version(store, base, {PATH: random_effect(1, 64, 96, "dense")})
    held, unheld = (store_version(store, base, *deltas(seed)) for seed in (1, 2))

    async def run() -> None:
        versions = Versions(store, resident_bytes=random_effect(1, 64, 96, "dense").nbytes)
        await versions.acquire(held, base, model)
        await versions.warm(unheld, base, model)
        waiting = asyncio.create_task(versions.acquire(large, base, model))
        await settled()
        assert resident(versions) == [held.stack_digest, unheld.stack_digest]
        versions.release(held.stack_digest)
        await asyncio.wait_for(waiting, 10)
        assert resident(versions) == [large.stack_digest]

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
        counting = CountingStore(tmp_path)
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


class CountingStore(ArtifactStore):
    """A store that counts who reads, and whose disk is slow until ``on`` is set."""

    reads: int = 0
    on: threading.Event | None = None

    def get(self, digest: str) -> bytes:
        self.reads += 1
        assert threading.current_thread() is not threading.main_thread()
        assert self.on is None or self.on.wait(30)
        return super().get(digest)


def test_loading_stalls_nobody_and_happens_once(
    store: ArtifactStore, base: Base, model: PreTrainedModel, tmp_path: Path
) -> None:
    ref = store_version(store, base, *deltas(1))

    async def run() -> None:
        slow = CountingStore(tmp_path)
        slow.on = threading.Event()
        versions = Versions(slow)
        given_up = asyncio.create_task(versions.acquire(ref, base, model))
        waiting = [asyncio.create_task(versions.acquire(ref, base, model)) for _ in range(3)]
        for tick in range(10):  # the loop is free
            await asyncio.sleep(0.01)
            if tick == 1:
                given_up.cancel()
        assert not any(task.done() for task in waiting)
        slow.on.set()
        await asyncio.gather(*waiting)
        assert slow.reads == 1
        assert versions.listed()[0].requests == 3, "who gave up holds nothing"

    asyncio.run(run())


class PartlyAway(ArtifactStore):
    """A store that gives all but some artifacts, until it is told to go on."""

    away: frozenset[str]
    back: threading.Event

    def get(self, digest: str) -> bytes:
        if digest in self.away:
            self.back.wait(30)
        return super().get(digest)


def test_a_version_that_its_store_does_not_give_holds_up_no_other(
    store: ArtifactStore, base: Base, model: PreTrainedModel, tmp_path: Path
) -> None:
    stuck, other = (store_version(store, base, *deltas(seed)) for seed in (1, 2))
    partly = PartlyAway(tmp_path)
    partly.away, partly.back = frozenset(stuck.stack), threading.Event()

    async def run() -> None:
        versions = Versions(partly)
        waiting = asyncio.create_task(versions.acquire(stuck, base, model))
        try:
            await settled()
            await asyncio.wait_for(versions.acquire(other, base, model), 10)
            assert not waiting.done()
        finally:
            partly.back.set()
        await asyncio.wait_for(waiting, 10)

    asyncio.run(run())


def test_what_one_request_needs_is_held_together_or_not_at_all(
    store: ArtifactStore, base: Base, model: PreTrainedModel
) -> None:
    """Three pairs of four versions, of which two have room; one version of a pair comes twice."""
    refs = [store_version(store, base, *deltas(seed)) for seed in (1, 2, 3, 4)]
    pairs = [(refs[0], refs[1]), (refs[1], refs[2], refs[1]), (refs[3], refs[0])]

    async def run() -> None:
        versions = Versions(store, resident_bytes=2 * SIZE)

        async def use(pair: tuple[VersionRef, ...]) -> None:
            effects = await versions.acquire_all(pair, base, model)
            found = {version.stack_digest: version for version in versions.listed()}
            assert sum(version.nbytes for version in found.values()) <= 2 * SIZE
            for ref, effect in zip(pair, effects, strict=True):
                assert PATH in effect
                assert found[ref.stack_digest].requests
            await asyncio.sleep(0.01)
            for ref in pair:
                versions.release(ref.stack_digest)

        async with asyncio.timeout(30):
            await asyncio.gather(*(use(pair) for pair in pairs * 5))
        assert not any(version.requests for version in versions.listed())

    asyncio.run(run())


def test_what_can_never_be_held_together_is_refused_at_once(
    store: ArtifactStore, base: Base, model: PreTrainedModel
) -> None:
    refs = [store_version(store, base, *deltas(seed)) for seed in (1, 2, 3)]

    async def run() -> None:
        versions = Versions(store, resident_bytes=2 * SIZE)
        async with asyncio.timeout(5):
            with pytest.raises(VersionUnavailable, match="together") as caught:
                await versions.acquire_all(refs, base, model)
        assert all(ref.id in caught.value.message for ref in refs)
        assert f"{3 * SIZE} bytes" in caught.value.message
        assert not any(version.requests for version in versions.listed())

    asyncio.run(run())
