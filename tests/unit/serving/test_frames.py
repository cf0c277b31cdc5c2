"""Answers on their way from the engine to its clients."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from registry.artifacts import ArtifactStore
from registry.bases import Base
from registry.errors import InvalidRequest
from registry.manifests import VersionManifest
from registry.settings import Settings
from serving.client import EngineClient
from serving.loading import load_lane
from serving.protocol import GenerateRequest, Piece, SamplingParams, VersionRef
from serving.server import Server
from serving.versions import Versions


def test_a_steps_answers_may_be_longer_than_a_frame(
    saved: Callable[[str], Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come in several; a single answer that fits into none is an error, and ends."""
    monkeypatch.setattr("serving.frames.MAX_FRAME", 20_000)
    base = saved("llama")
    settings = Settings(kv_bytes=2**22, step_tokens=1024, engine_threads=1, device="cpu")
    lane = load_lane(base, settings)
    version = VersionRef.of(VersionManifest(base.ref, ()))

    async def asked(client: EngineClient, prompt: int, most: int) -> list[Piece]:
        params = SamplingParams(max_tokens=most, temperature=0, logprobs=5, ignore_eos=True)
        tokens = tuple(range(prompt))
        request = GenerateRequest(version, params, prompt_tokens=tokens, echo=True)
        return [piece async for piece in client.generate(request)]

    async def talk(listening: socket.socket) -> list[object]:
        server, client = Server([lane], Versions(ArtifactStore(tmp_path))), EngineClient(path)
        async with asyncio.timeout(15), await server.serve(listening):
            calls = [(40, 3)] * 6 + [(250, 200)]
            asking = [asyncio.create_task(asked(client, *call)) for call in calls]
            while server.engine._inbox.qsize() < len(calls):  # one step will answer them all
                await asyncio.sleep(0.01)
            stepping = asyncio.create_task(asyncio.to_thread(server.engine.run))
            try:
                answers: list[object] = await asyncio.gather(*asking, return_exceptions=True)
                while len(lane):
                    await asyncio.sleep(0.01)
            finally:
                server.engine.stop()
                await stepping
                await client.close()
        return answers

    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        *answers, long = asyncio.run(talk(listening))
    assert all(isinstance(answer, list) and len(answer) == 3 for answer in answers)
    assert isinstance(long, InvalidRequest)
    assert (long.param, "longer than" in long.message) == ("logprobs", True)
    assert lane.completion_tokens < 200, "the long one's stream ended with it"
