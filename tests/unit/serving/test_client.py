"""The engine's client: what it sends, and what it does where the engine is not as it should be."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from registry.errors import Unavailable
from registry.manifests import BaseRef, VersionManifest
from serving.client import EngineClient
from serving.frames import encode_frame, read_frame
from serving.protocol import GenerateRequest, Piece, VersionRef

VERSION = VersionRef.of(VersionManifest(BaseRef("atlas", "0" * 64), ()))
#: Characters of a prompt: more bytes than the buffers of a socket hold.
MUCH = 8 * 2**20


def test_a_prompt_travels_once_for_all_its_samples(tmp_path: Path) -> None:
    prompts = ["x" * 10_000, "y" * 10_000]
    requests = [GenerateRequest(VERSION, prompt=prompt, samples=3) for prompt in prompts]
    frames: list[dict[str, Any]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames.extend([await read_frame(reader) or {} for _ in prompts])
        ids = [frame["id"] + sample for frame in frames for sample in range(frame["samples"])]
        ends = [
            {"id": id, **Piece(str(place), finish_reason="stop").to_json()}
            for place, id in enumerate(ids)
        ]
        writer.write(encode_frame({"pieces": ends}))
        await writer.drain()
        await reader.read()
        writer.close()

    async def ask() -> list[tuple[int, str]]:
        client = EngineClient(tmp_path / "s")
        async with await asyncio.start_unix_server(answer, tmp_path / "s"):
            found = [(index, piece.text) async for index, piece in client.generate_all(requests)]
            await client.close()
        return found

    assert asyncio.run(ask()) == [(place, str(place)) for place in range(6)]
    assert [frame["prompt"] for frame in frames] == prompts


def test_an_engine_that_reads_nothing_does_not_hold_up_the_end(tmp_path: Path) -> None:
    request = GenerateRequest(VERSION, prompt="x" * MUCH)

    async def ask(client: EngineClient) -> None:
        async for _ in client.generate(request):
            pass

    async def talk(listening: socket.socket) -> None:
        client = EngineClient(tmp_path / "s")
        asking = asyncio.create_task(ask(client))
        deaf, _ = await asyncio.to_thread(listening.accept)
        with deaf:
            await asyncio.to_thread(deaf.recv, 1)
            async with asyncio.timeout(1):
                await client.close()
            with pytest.raises(Unavailable, match="stopped while it worked"):
                await asking

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        asyncio.run(talk(listening))
