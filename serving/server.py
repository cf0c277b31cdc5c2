"""The engine's front: a Unix socket on the event loop, a step's answers to each connection."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
from collections import Counter, defaultdict, deque
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, cast

import torch

from registry.errors import ErrataError, InvalidRequest, VersionUnavailable
from serving.engine import Engine
from serving.frames import MAX_FRAME, FrameError, encode_frame, read_frame
from serving.lane import Lane, Output
from serving.protocol import GenerateRequest, VersionRef, error_to_json
from serving.scheduler import Sequence, completion_limit
from serving.status import EngineStatus
from serving.stream import Stream
from serving.versions import Versions
from telemetry.context import bound

#: A client that reads so little that this many bytes wait for it is cut off; long prompts' echoes
#: may make one step's answers several frames.
MOST_UNREAD = 4 * MAX_FRAME
#: Most seconds that a client is asked to wait for a place in the queue.
MOST_PATIENCE = 60

logger = logging.getLogger(__name__)


class Connection:
    """A client: its requests on their way into the engine, and those in it."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.admissions: dict[int, asyncio.Task[None]] = {}
        self.streams: dict[int, tuple[Lane, Stream]] = {}
        self._writer = writer

    def __contains__(self, number: int) -> bool:
        return number in self.admissions or number in self.streams

    def send(self, entries: list[dict[str, Any]]) -> list[int]:
        """Send answers; the numbers of those that are too long, and became errors."""
        if self._writer.is_closing():
            return []
        if self._writer.transport.get_write_buffer_size() > MOST_UNREAD:
            self._writer.transport.abort()
            return []
        return self._write(entries)

    def _write(self, entries: list[dict[str, Any]]) -> list[int]:
        """Entries as one frame, or as one each half where that would be too long."""
        try:
            frame = encode_frame({"pieces": entries})
        except FrameError:
            if half := len(entries) // 2:
                return self._write(entries[:half]) + self._write(entries[half:])
            number = entries[0]["id"]
            error = InvalidRequest(
                f"the answer is longer than {MAX_FRAME >> 20} MiB: ask for fewer log-probabilities,"
                " or shorten the prompt",
                param="logprobs",
            )
            self._write([{"id": number, "error": error_to_json(error)}])
            return [number]
        self._writer.write(frame)
        return []


class Server:
    """Admits requests, hands them to the engine, and its outputs to the connections."""

    def __init__(self, lanes: list[Lane], versions: Versions) -> None:
        self._loop = asyncio.get_running_loop()
        self._versions = versions
        self._tokenising = ThreadPoolExecutor(1, thread_name_prefix="prompts")
        self._compiling = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._ends: deque[float] = deque(maxlen=64)  # when the last requests ended
        # requests on their way in, by base and by whether their versions are loaded
        self._admitting: Counter[tuple[str, bool]] = Counter()
        self.engine = Engine(lanes, self._deliver_soon)

    async def serve(self, listening: socket.socket) -> asyncio.Server:
        return await asyncio.start_unix_server(self._converse, sock=listening)

    def status(self) -> EngineStatus:
        lanes = list(self.engine.lanes.values())
        return EngineStatus(
            pid=os.getpid(),
            threads=torch.get_num_threads(),
            bases=tuple(lane.status() for lane in lanes),
            versions=self._versions.listed(),
            steps=self.engine.steps,
            prompt_tokens=sum(lane.prompt_tokens for lane in lanes),
            completion_tokens=sum(lane.completion_tokens for lane in lanes),
            loads=self._versions.loads,
            failed_loads=self._versions.failed_loads,
        )

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(writer)
        try:
            while (body := await read_frame(reader)) is not None:
                self._order(connection, body)
        except (OSError, FrameError) as error:
            logger.warning("a connection ended: %s", error)
        finally:
            for number in [*connection.admissions, *connection.streams]:
                self._cancel(connection, number)
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def _order(self, connection: Connection, body: Mapping[str, Any]) -> None:
        match body:
            case {"op": "generate", "id": int(first), "samples": int(samples)}:
                for number in range(first, first + samples):
                    self._begin(connection, number, self._admit(connection, number, body))
            case {"op": "warm", "id": int(number)}:
                self._begin(connection, number, self._warm(connection, number, body))
            case {"op": "cancel", "id": int(number)}:
                self._cancel(connection, number)
            case {"op": "status", "id": int(number)}:
                connection.send([{"id": number, "status": self.status().to_json()}])
            case _:
                raise FrameError("a frame with an unknown op")

    def _begin(self, connection: Connection, number: int, work: Coroutine[Any, Any, None]) -> None:
        if number in connection:
            work.close()
            raise FrameError("a frame with an id in use")
        task = connection.admissions[number] = self._loop.create_task(work)
        task.add_done_callback(lambda _: connection.admissions.pop(number, None))

    def _cancel(self, connection: Connection, number: int) -> None:
        if number in connection.streams:
            lane, stream = connection.streams[number]
            self.engine.cancel(lane, stream.key)
        elif (task := connection.admissions.get(number)) is not None:
            task.cancel()

    async def _warm(self, connection: Connection, number: int, body: Mapping[str, Any]) -> None:
        """Load a version without holding it."""
        try:
            ref = VersionRef.from_json(body["version"])
            lane = self._lane(ref)
            await self._versions.warm(ref, lane.base, lane.runner.model)
            connection.send([{"id": number, "warm": True}])
        except ErrataError as error:
            connection.send([{"id": number, "error": error_to_json(error)}])
        except Exception as error:
            logger.exception("a version could not be warmed")
            failure = ErrataError(f"the version could not be read: {type(error).__name__}")
            connection.send([{"id": number, "error": error_to_json(failure)}])

    async def _admit(self, connection: Connection, number: int, body: Mapping[str, Any]) -> None:
        """Tokenise the prompt and load the version, beside the running streams; then queue it."""
        with bound(**body.get("context", {})):
            await self._admit_known(connection, number, body)

    async def _admit_known(
        self, connection: Connection, number: int, body: Mapping[str, Any]
    ) -> None:
        try:
            lane, stream = await self._stream(connection, number, body)
        except ErrataError as error:
            connection.send([{"id": number, "error": error_to_json(error)}])
        except Exception as error:
            logger.exception("a request could not be admitted")
            failure = ErrataError(f"the request could not be read: {type(error).__name__}")
            connection.send([{"id": number, "error": error_to_json(failure)}])
        else:
            connection.streams[number] = (lane, stream)
            self.engine.submit(lane, stream)

    async def _stream(
        self, connection: Connection, number: int, body: Mapping[str, Any]
    ) -> tuple[Lane, Stream]:
        """A request as its base computes it.

        Raises:
            TooManyRequests: as many as may wait for this base do, or are on their way to it. Who
                waits for a version to load takes the place of nobody whose version is loaded.
        """
        try:
            request = GenerateRequest.from_json(body).sample(number - body["id"])
        except (KeyError, TypeError) as error:
            raise InvalidRequest(f"a frame is no request: {error!r}") from error
        lane = self._lane(request.version)
        limits = lane.scheduler.limits
        way = (lane.base.name, self._versions.loaded(request.versions))
        if lane.scheduler.waiting + self._admitting[way] >= limits.max_waiting:
            raise lane.full(self._drained_in(limits.max_waiting))
        self._admitting[way] += 1
        try:
            return await self._admitted(connection, number, request, lane)
        finally:
            self._admitting[way] -= 1

    async def _admitted(
        self, connection: Connection, number: int, request: GenerateRequest, lane: Lane
    ) -> tuple[Lane, Stream]:
        limits = lane.scheduler.limits
        params = request.params
        guide = None
        if params.grammar is not None:
            guide = await self._loop.run_in_executor(
                self._compiling, lane.guides.guide, params.grammar
            )
        prompt = await self._loop.run_in_executor(self._tokenising, lane.prompts.read, request)
        sequence = Sequence(
            (connection, number),
            tuple(version.stack_digest for version in request.versions),
            prompt,
            completion_limit(limits, len(prompt), params.max_tokens, len(request.versions)),
            wants_prompt_logits=request.echo and params.logprobs is not None,
            tenant=request.tenant,
        )
        echo = None
        if request.echo:
            echo = request.prompt
            if echo is None:
                echo = await self._loop.run_in_executor(self._tokenising, lane.prompts.text, prompt)
        return lane, Stream(
            sequence,
            params,
            await self._versions.acquire_all(request.versions, lane.base, lane.runner.model),
            lane.decoder,
            lane.eos,
            guide=guide,
            echo=echo,
            alpha=0.0 if request.proxy is None else request.proxy.alpha,
        )

    def _drained_in(self, waiting: int) -> int:
        """Seconds in which so many requests get their turn, as fast as the last ones ended."""
        if not self._ends:
            return 1
        pace = (self._loop.time() - self._ends[0]) / len(self._ends)
        return max(1, min(MOST_PATIENCE, math.ceil(waiting * pace)))

    def _lane(self, ref: VersionRef) -> Lane:
        lane = self.engine.lanes.get(ref.base)
        if lane is None:
            raise VersionUnavailable(
                f"version {ref.id}: its base {ref.base!r} is not loaded; name it in ERRATA_BASES"
            )
        return lane

    def _deliver_soon(self, outputs: list[Output]) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._deliver, outputs)

    def _deliver(self, outputs: list[Output]) -> None:
        frames: defaultdict[Connection, list[dict[str, Any]]] = defaultdict(list)
        for output in outputs:
            connection, number = cast(tuple[Connection, int], output.key)
            if output.ends:
                _, stream = connection.streams.pop(number)
                self._ends.append(self._loop.time())
                for digest in stream.sequence.versions:
                    self._versions.release(digest)
            if output.piece is not None:
                frames[connection].append({"id": number, **output.piece.to_json()})
            elif output.error is not None:
                frames[connection].append({"id": number, "error": error_to_json(output.error)})
        for connection, entries in frames.items():
            for number in connection.send(entries):
                self._cancel(connection, number)
