"""The engine's client: many requests over one Unix socket, without torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from registry.errors import Unavailable
from serving.frames import FrameError, encode_frame, read_frame
from serving.protocol import EngineStatus, GenerateRequest, Piece, error_from_json


class EngineClient:
    """Speaks to the engine at ``socket_path``; connects, and connects again, by itself.

    Args:
        socket_path: the engine's Unix socket.
        wait_seconds: how long a request waits for an engine that is starting.
    """

    def __init__(self, socket_path: Path | str, *, wait_seconds: float = 5.0) -> None:
        self._path = Path(socket_path)
        self._wait = wait_seconds
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Piece, None]:
        """The completion, a piece a step; the last has ``finish_reason`` and ``usage``.

        Closing the iterator, or cancelling the task that reads it, ends the request in the engine.

        Raises:
            Unavailable: no engine answers, or it stopped during this request.
            ErrataError: whatever the engine refused the request with.
        """
        connection = await self._connected()
        number, inbox = connection.open({"op": "generate", **request.to_json()})
        finished = False
        try:
            while not finished:
                body = await inbox.get()
                if body is None or "error" in body:
                    finished = True
                    raise self._lost() if body is None else error_from_json(body["error"])
                piece = Piece.from_json(body)
                finished = piece.finish_reason is not None
                yield piece
        finally:
            connection.close_request(number, cancel=not finished)

    async def status(self) -> EngineStatus:
        """What the engine holds now.

        Raises:
            Unavailable: no engine answers.
        """
        connection = await self._connected()
        number, inbox = connection.open({"op": "status"})
        try:
            body = await inbox.get()
        finally:
            connection.close_request(number, cancel=False)
        if body is None:
            raise self._lost()
        return EngineStatus.from_json(body["status"])

    async def close(self) -> None:
        """End the connection, and with it every request on it."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def _connected(self) -> _Connection:
        deadline = asyncio.get_running_loop().time() + self._wait
        async with self._connecting:
            while self._connection is None or self._connection.lost:
                try:
                    streams = await asyncio.open_unix_connection(str(self._path))
                    self._connection = _Connection(*streams)
                except OSError as error:
                    if asyncio.get_running_loop().time() >= deadline:
                        raise Unavailable(
                            "the inference engine does not answer: it is starting, or it stopped;"
                            " try again in a few seconds",
                            retry_after=5,
                        ) from error
                    await asyncio.sleep(0.05)
            return self._connection

    @staticmethod
    def _lost() -> Unavailable:
        return Unavailable(
            "the inference engine stopped while it worked on this request; send it again",
            retry_after=1,
        )


class _Connection:
    """One socket; a task hands every answer to the inbox of its request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.lost = False
        self._writer = writer
        self._inboxes: dict[int, asyncio.Queue[dict[str, Any] | None]] = {}
        self._last = 0
        self._task = asyncio.create_task(self._read(reader))

    def open(self, body: Mapping[str, Any]) -> tuple[int, asyncio.Queue[dict[str, Any] | None]]:
        """Send a request; its number, and the inbox that gets its answers (None: lost)."""
        self._last += 1
        inbox: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._inboxes[self._last] = inbox
        if self.lost:
            inbox.put_nowait(None)
        else:
            self._writer.write(encode_frame({**body, "id": self._last}))
        return self._last, inbox

    def close_request(self, number: int, *, cancel: bool) -> None:
        self._inboxes.pop(number, None)
        if cancel and not self.lost:
            self._writer.write(encode_frame({"op": "cancel", "id": number}))

    async def close(self) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        with suppress(OSError):
            await self._writer.wait_closed()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while (body := await read_frame(reader)) is not None:
                for entry in body["pieces"]:
                    if (inbox := self._inboxes.get(entry["id"])) is not None:
                        inbox.put_nowait(entry)
        except (OSError, FrameError):
            pass  # as lost as if the stream had ended
        finally:
            self.lost = True
            self._writer.close()
            for inbox in self._inboxes.values():
                inbox.put_nowait(None)
