import asyncio
from pathlib import Path

import pytest

from app.inference.generate import merged
from serving.client import EngineClient
from serving.frames import encode_frame, read_frame
from serving.protocol import GenerateRequest, VersionRef

REQUEST = GenerateRequest(VersionRef("ver_x", "atlas", (), ""), prompt="x")


def test_an_answer_nobody_expected_ends_the_request_instead_of_hanging_it(tmp_path: Path) -> None:
    async def answer_nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await read_frame(reader)
        writer.write(encode_frame({"pieces": [{"id": (asked or {})["id"]}]}))
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def ask() -> None:
        client = EngineClient(tmp_path / "s")
        async with await asyncio.start_unix_server(answer_nonsense, tmp_path / "s"):
            try:
                async with asyncio.timeout(10):
                    async for _ in merged(client, [REQUEST]):
                        pass
            finally:
                await client.close()

    with pytest.raises(KeyError):
        asyncio.run(ask())
