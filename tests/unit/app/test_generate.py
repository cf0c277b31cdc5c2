import asyncio
from pathlib import Path

import pytest

from app.inference.generate import Completion, best
from registry.errors import DeadlineExceeded
from serving.client import EngineClient
from serving.frames import encode_frame, read_frame
from serving.protocol import GenerateRequest, TokenLogprob, Usage, VersionRef

REQUEST = GenerateRequest(VersionRef("ver_x", "atlas", (), ""), prompt="x")


async def exhausted(client: EngineClient, seconds: float | None = None) -> None:
    async with asyncio.timeout(10):
        async for _ in client.generate_all([REQUEST], seconds=seconds):
            pass


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
                await exhausted(client)
            finally:
                await client.close()

    with pytest.raises(KeyError):
        asyncio.run(ask())


def test_an_engine_that_is_silent_past_the_deadline_is_told_to_stop(tmp_path: Path) -> None:
    asked: list[dict[str, object] | None] = []

    async def be_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.extend([await read_frame(reader), await read_frame(reader)])
        writer.close()

    async def ask() -> None:
        client = EngineClient(tmp_path / "s")
        async with await asyncio.start_unix_server(be_silent, tmp_path / "s"):
            try:
                with pytest.raises(DeadlineExceeded, match="timeout"):
                    await exhausted(client, seconds=0.05)
                while len(asked) < 2:
                    await asyncio.sleep(0.01)
            finally:
                await client.close()

    asyncio.run(ask())
    assert [(frame or {})["op"] for frame in asked] == ["generate", "cancel"]


def completion(text: str, *logprobs: float, echoed: int = 0) -> Completion:
    entries = [TokenLogprob(0, "", None if i == 0 else -9.0) for i in range(echoed)]
    entries += [TokenLogprob(0, "", value) for value in logprobs]
    return Completion(text, entries, "stop", Usage(3, len(logprobs)))


def test_the_best_have_the_highest_mean_log_probability() -> None:
    first = [completion("a", -3.0), completion("b", -1.0, -1.0), completion("", *())]
    second = [completion("c", -0.5, echoed=3), completion("d", -0.1), completion("e", -2.0)]
    assert [c.text for c in best([*first, *second], 3, 2)] == ["b", "a", "d", "c"]
    assert [c.text for c in best(first, 3, 3)] == ["a", "b", ""]
