"""The engine's front with versions that have little room."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import serving.versions
from registry.artifacts import ArtifactStore
from registry.bases import Base
from registry.errors import TooManyRequests, VersionUnavailable
from serving.client import EngineClient
from serving.lane import Lane
from serving.protocol import GenerateRequest, Proxy, SamplingParams, VersionRef
from serving.server import Server
from serving.versions import Versions
from tests.models import random_effect, store_version
from tests.unit.serving.test_lane import lane_of

PATH = "model.layers.1.mlp.down_proj"
SIZE = random_effect(1, 64, 96, "rank3").nbytes
SHORT = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def base(saved: Callable[[str], Base]) -> Base:
    return saved("llama")


@pytest.fixture(scope="module")
def lane(base: Base) -> Lane:
    return lane_of(base, max_waiting=2)


@pytest.fixture
def refs(base: Base, tmp_path: Path) -> list[VersionRef]:
    return [
        store_version(ArtifactStore(tmp_path), base, {PATH: random_effect(seed, 64, 96, "rank3")})
        for seed in (1, 2, 3)
    ]


@asynccontextmanager
async def serving_with(lane: Lane, versions: Versions, path: Path) -> AsyncIterator[EngineClient]:
    """A client of a server whose engine runs."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        server = Server([lane], versions)
        running = asyncio.get_running_loop().run_in_executor(None, server.engine.run)
        front = await server.serve(listening)
        client = EngineClient(path)
        try:
            yield client
        finally:
            await client.close()
            front.close()
            server.engine.stop()
            await running


async def tokens(client: EngineClient, request: GenerateRequest) -> int:
    return sum([len(piece.tokens) async for piece in client.generate(request)])


def test_voices_that_have_no_room_together_are_refused_at_once(
    lane: Lane, refs: list[VersionRef], tmp_path: Path
) -> None:
    proxied = GenerateRequest(refs[0], SHORT, prompt="a", proxy=Proxy(refs[1], refs[2]))

    async def talk() -> None:
        versions = Versions(ArtifactStore(tmp_path), resident_bytes=2 * SIZE)
        async with serving_with(lane, versions, tmp_path / "s") as client:
            async with asyncio.timeout(5):
                with pytest.raises(VersionUnavailable, match="ERRATA_RESIDENT_BYTES"):
                    await tokens(client, proxied)
            assert not any(version.requests for version in versions.listed())
            assert await tokens(client, GenerateRequest(refs[2], SHORT, prompt="a")) == 4

    asyncio.run(talk())


def test_pairs_of_voices_do_not_wait_for_each_other(
    lane: Lane, refs: list[VersionRef], tmp_path: Path
) -> None:
    """Of two requests each has room alone; both lack the same version when they come."""
    a, b, c = refs
    rounds = (((a, b), (c, b)), ((b, c), (a, c)), ((c, a), (b, a)))

    async def talk() -> None:
        versions = Versions(ArtifactStore(tmp_path), resident_bytes=2 * SIZE)
        async with serving_with(lane, versions, tmp_path / "s") as client:
            for pairs in rounds:
                calls = (
                    tokens(client, GenerateRequest(one, SHORT, prompt="a", proxy=Proxy(one, two)))
                    for one, two in pairs
                )
                assert await asyncio.gather(*calls) == [4, 4]
        assert not any(version.requests for version in versions.listed())

    asyncio.run(talk())


def test_who_waits_for_a_version_takes_no_place_of_one_that_is_loaded(
    lane: Lane,
    base: Base,
    refs: list[VersionRef],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two may wait. Two wait for room; the third is sent away, and the loaded ones are answered."""
    monkeypatch.setattr(serving.versions, "ROOM_SECONDS", 60.0)
    requests = [GenerateRequest(ref, SHORT, prompt="a") for ref in refs]

    async def talk() -> None:
        versions = Versions(ArtifactStore(tmp_path), resident_bytes=2 * SIZE)
        for ref in refs[:2]:
            await versions.acquire(ref, base, lane.runner.model)
        async with serving_with(lane, versions, tmp_path / "s") as client:
            waiting = [asyncio.create_task(tokens(client, requests[2])) for _ in range(2)]
            await asyncio.sleep(0.1)
            with pytest.raises(TooManyRequests):
                await tokens(client, requests[2])
            for request in requests[:2]:
                assert await tokens(client, request) == 4
            assert not any(task.done() for task in waiting)
            versions.release(refs[0].stack_digest)
            async with asyncio.timeout(30):
                assert await asyncio.gather(*waiting) == [4, 4]

    asyncio.run(talk())
