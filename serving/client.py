"""The engine's client: many requests over one Unix socket, without torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from registry.errors import DeadlineExceeded, ErrataError, Unavailable
from serving.frames import FrameError, encode_frame, read_frame
from serving.protocol import GenerateRequest, Piece, VersionRef, error_from_json
from serving.status import EngineStatus
from telemetry import context

#: The answers to one caller's requests.
_Inbox = asyncio.Queue[dict[str, Any] | None]
#: Comes into an inbox when its time is up.
_LATE: dict[str, Any] = {}


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
        self._ended_by: ErrataError | None = None
        self._connecting = asyncio.Lock()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Piece, None]:
        """The completion, a piece a step; the last has ``finish_reason`` and ``usage``.

        Closing the iterator, or cancelling the task that reads it, ends the request in the engine.

        Raises:
            Unavailable: no engine answers, or it stopped during this request.
            ErrataError: whatever the engine refused the request with.
        """
        async with aclosing(self.generate_all([request])) as pieces:
            async for _, piece in pieces:
                yield piece

    async def generate_all(
        self, requests: Sequence[GenerateRequest], *, seconds: float | None = None
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces of several completions as they come, each with its completion's index.

        The samples of a request follow those of the one before. Leaving early ends what still runs,
        as does one request's error. All must be whole within ``seconds``, the time that they wait
        in the queue included.

        Raises:
            DeadlineExceeded: they are not; and what ``generate`` raises.
        """
        loop = asyncio.get_running_loop()
        inbox = _Inbox()
        timer = None if seconds is None else loop.call_later(seconds, inbox.put_nowait, _LATE)
        known = context.fields()
        running: dict[int, int] = {}
        try:
            connection = await self._connected()
            for request in requests:
                order = {"op": "generate", "context": known, **request.to_json()}
                for number in connection.open(order, inbox, request.samples):
                    running[number] = len(running)
                await asyncio.sleep(0)  # many long prompts do not hold up the others' requests
            while running:
                body = await inbox.get()
                if body is None:
                    running.clear()
                    raise self._lost()
                if body is _LATE:
                    raise DeadlineExceeded(
                        f"the answer was not whole within {seconds:g} s (timeout): ask for fewer"
                        " tokens, allow more time, or try again when there is less to do"
                    )
                if "error" in body:
                    connection.close_request(body["id"], cancel=False)
                    del running[body["id"]]
                    raise error_from_json(body["error"])
                piece = Piece.from_json(body)
                index = running[body["id"]]
                if piece.finish_reason is not None:
                    connection.close_request(body["id"], cancel=False)
                    del running[body["id"]]
                yield index, piece
        finally:
            if timer is not None:
                timer.cancel()
            for number in running:
                connection.close_request(number, cancel=True)

    async def status(self) -> EngineStatus:
        """What the engine holds now.

        Raises:
            Unavailable: no engine answers.
        """
        body = await self._ask({"op": "status"})
        return EngineStatus.from_json(body["status"])

    async def warm(self, version: VersionRef) -> None:
        """Have the engine load a version, so that its first request need not wait for that.

        Raises:
            VersionUnavailable: the engine cannot load it.
            Unavailable: no engine answers.
        """
        await self._ask({"op": "warm", "version": asdict(version)})

    async def close(self, reason: ErrataError | None = None) -> None:
        """End the connection, and with it every request on it; its callers are told the reason."""
        self._ended_by = reason
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def _ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """The one answer to an order."""
        connection = await self._connected()
        inbox = _Inbox()
        (number,) = connection.open(order, inbox)
        try:
            body = await inbox.get()
        finally:
            connection.close_request(number, cancel=False)
        if body is None:
            raise self._lost()
        if "error" in body:
            raise error_from_json(body["error"])
        return body

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

    def _lost(self) -> ErrataError:
        if self._ended_by is not None:
            return self._ended_by
        return Unavailable(
            "the inference engine stopped while it worked on this request; send it again",
            retry_after=1,
        )


class _Connection:
    """One socket; a task hands every answer to the inbox of its request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.lost = False
        self._writer = writer
        self._inboxes: dict[int, _Inbox] = {}
        self._last = 0
        self._task = asyncio.create_task(self._read(reader))

    def open(self, body: Mapping[str, Any], inbox: _Inbox, samples: int = 1) -> range:
        """Send a request; its samples' numbers.

        The inbox gets their answers (None: the engine is lost).
        """
        numbers = range(self._last + 1, self._last + 1 + samples)
        self._last += samples
        self._inboxes.update(dict.fromkeys(numbers, inbox))
        if self.lost:
            inbox.put_nowait(None)
        else:
            self._writer.write(encode_frame({**body, "id": numbers[0]}))
        return numbers

    def close_request(self, number: int, *, cancel: bool) -> None:
        self._inboxes.pop(number, None)
        if cancel and not self.lost:
            self._writer.write(encode_frame({"op": "cancel", "id": number}))

    async def close(self) -> None:
        """At once, whatever an engine that hangs has not read yet."""
        self._writer.transport.abort()
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
