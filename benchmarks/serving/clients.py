"""A streaming client that takes little of the cores it shares with what it measures."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

_EVENT = b'data: {"'
_END = b"data: [DONE]"


class Stream(asyncio.Protocol):
    """One streamed completion on a connection of its own.

    Attributes:
        times: when each event came, as ``time.perf_counter`` tells it; the last one is the usage.
        ended: set when the connection has ended.
    """

    def __init__(self, request: bytes) -> None:
        self.times: list[float] = []
        self.ended = asyncio.get_running_loop().create_future()
        self._request = request
        self._head = b""
        self._rest = b""
        self._last = b""
        self._is_whole = False
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            self._transport = transport
            transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._head = self._head or data[:64]
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            if _EVENT in event:
                self.times.append(now)
                self._last = event
            elif _END in event:
                self._is_whole = True

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    @property
    def tokens(self) -> int:
        """The completion's tokens, as the usage of a stream that came whole says; else -1."""
        if not (self._is_whole and self._head.split(b" ")[1:2] == [b"200"]):
            return -1
        body = json.loads(self._last[self._last.index(_EVENT) + len(_EVENT) - 2 :])
        tokens: int = body["usage"]["completion_tokens"]
        return tokens


async def start_stream(url: str, model: str, prompt: Sequence[int], max_tokens: int) -> Stream:
    """Send a greedy streaming completion; its answer is still to come."""
    host, _, port = urlsplit(url).netloc.partition(":")
    body = completion(model, prompt, max_tokens)
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    _, stream = await loop.create_connection(lambda: Stream(head.encode() + data), host, int(port))
    return stream


def completion(model: str, prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
    return {"model": model, "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0}


async def stream_all(
    url: str, model: str, prompts: Sequence[Sequence[int]], max_tokens: int
) -> Mapping[str, float]:
    """All prompts at once, to their ends: seconds, tokens, and streams that did not end well."""
    started = time.perf_counter()
    streams = await asyncio.gather(
        *(start_stream(url, model, prompt, max_tokens) for prompt in prompts)
    )
    await asyncio.gather(*(stream.ended for stream in streams))
    seconds = time.perf_counter() - started
    tokens = [stream.tokens for stream in streams]
    return {
        "seconds": seconds,
        "tokens": sum(tokens),
        "failed": sum(count != max_tokens for count in tokens),
        "events": sum(len(stream.times) for stream in streams),
    }
