"""A client that takes little of the cores it shares with what it loads; a connection an answer."""

from __future__ import annotations

import asyncio
import json
import time
from itertools import pairwise
from typing import Any

from benchmarks.load.workload import Ask

_EVENT = b'data: {"'
_END = b"data: [DONE]"


class Answer(asyncio.Protocol):
    """The answer to one request, as it comes.

    Attributes:
        sent, ended_at: as ``time.time`` tells them.
        times: when each event came, as ``time.perf_counter`` tells it.
        ended: set when the connection has ended.
    """

    def __init__(self, ask: Ask, floor: int) -> None:
        self.ask = ask
        self.floor = floor  # the endpoint's generation that was known when this was asked
        self.sent = time.time()
        self.begun = time.perf_counter()
        self.seconds = 0.0
        self.ended_at = 0.0
        self.times: list[float] = []
        self.status = 0
        self.version = ""
        self.generation = 0
        self.mixed = False
        self.tokens = 0
        self.hung_up = False
        self.whole = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._rest = b""
        self._last = b""
        self._in_body = False
        self._mark = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            self._transport = transport

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._rest += data
        if not self._in_body:
            head, blank, rest = self._rest.partition(b"\r\n\r\n")
            if not blank:
                return
            self._read_head(head)
            self._in_body, self._rest = True, rest
        if not self.ask.stream:
            return
        *events, self._rest = self._rest.split(b"\n\n")
        for event in events:
            if _EVENT in event:
                self.times.append(now)
                self._last = event
                self.mixed |= self._mark not in event
            elif _END in event:
                self.whole = True
        if self.ask.hang_up is not None and len(self.times) >= self.ask.hang_up:
            self.hung_up = True
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.ended.done():
            return
        self.ended_at, self.seconds = time.time(), time.perf_counter() - self.begun
        if self.status == 200 and not self.hung_up:
            self._read_end()
        self._rest = self._last = b""
        self._transport = None
        self.ended.set_result(None)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    @property
    def gaps(self) -> list[float]:
        """Seconds between the events of tokens; the usage, which follows the last one, is none."""
        return [later - earlier for earlier, later in pairwise(self.times[:-1])]

    def _read_head(self, head: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(first.split(" ")[1])
        headers = dict(line.lower().split(": ", 1) for line in lines)
        self.version = headers.get("errata-version", "")
        self.generation = int(headers.get("errata-generation", "0"))
        self._mark = self.version.encode()

    def _read_end(self) -> None:
        """What came must be whole: all of the tokens, counted, under one version."""
        text = self._last[self._last.find(_EVENT) + 6 :] if self.ask.stream else self._rest
        try:
            body: dict[str, Any] = json.loads(text)
            self.tokens = body["usage"]["completion_tokens"]
        except (ValueError, KeyError):
            self.whole = False
            return
        self.mixed |= body.get("version") != self.version
        self.whole = self.whole or not self.ask.stream


async def send(host: str, port: int, ask: Ask, floor: int, patience: float) -> Answer:
    """Ask, and wait for the answer's end; one that does not end in time is not whole."""
    data = json.dumps(ask.body()).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    answer = Answer(ask, floor)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(lambda: answer, host, port)
    transport.write(head.encode() + data)
    try:
        async with asyncio.timeout(patience):
            await asyncio.shield(answer.ended)
    except TimeoutError:
        answer.close()
        await answer.ended
    return answer
