from __future__ import annotations

import asyncio
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from registry.bases import Base
from registry.errors import InvalidRequest, TooManyRequests, Unavailable, VersionUnavailable
from serving.client import EngineClient
from serving.invariance import MOST_ROWS
from serving.protocol import GenerateRequest, Piece, SamplingParams, VersionRef
from serving.socket_file import SocketFile
from serving.status import EngineStatus
from tests.models import random_effect, store_version
from tests.unit.serving.engines import EngineProcess

DOWN = "model.layers.1.mlp.down_proj"
GREEDY = SamplingParams(max_tokens=16, temperature=0, logprobs=3, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def base(saved: Callable[[str], Base]) -> Base:
    return saved("llama")


@pytest.fixture(scope="module")
def engine(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    settings = {"ERRATA_BATCH_INVARIANT": "true", "ERRATA_DEVICE": "cpu"}
    engine = EngineProcess(tmp_path_factory.mktemp("e"), f"{base.name}={base.folder}", settings)
    engine.start()
    engine.wait_ready()
    yield engine
    if engine.process is not None:
        assert engine.end() == 0, engine.log
    assert not engine.socket.exists()


@pytest.fixture(scope="module")
def versions(engine: EngineProcess, base: Base) -> list[VersionRef]:
    """The base and seven versions on it, of every kind of effect, stacks among them."""
    kinds = ["rank1", "rank3", "dense", "scale", "all"]
    refs = [store_version(engine.store, base)]
    for seed, kind in enumerate(kinds):
        refs.append(store_version(engine.store, base, {DOWN: random_effect(seed, 64, 96, kind)}))
    for depth in (2, 3):
        stack = [{DOWN: random_effect(10 + d, 64, 96, kinds[d])} for d in range(depth)]
        refs.append(store_version(engine.store, base, *stack))
    return refs


async def collected(client: EngineClient, request: GenerateRequest) -> list[Piece]:
    """The pieces, without where their seconds went."""
    pieces = [piece async for piece in client.generate(request)]
    timing = pieces[-1].timing
    assert timing is not None
    assert all(0 <= seconds < 300 for seconds in timing)
    assert [piece.timing for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    return [*pieces[:-1], pieces[-1]._replace(timing=None)]


async def exhausted(stream: AsyncIterator[Piece]) -> None:
    async for _ in stream:
        pass


async def settled(client: EngineClient) -> EngineStatus:
    """The status once nothing runs or waits; fails where something stays."""
    for _ in range(1000):
        status = await client.status()
        if not any(base.running or base.waiting or base.kv_used for base in status.bases):
            return status
        await asyncio.sleep(0.05)
    raise AssertionError(status)


def test_the_status_says_what_is_loaded(engine: EngineProcess, base: Base) -> None:
    async def talk() -> None:
        client = EngineClient(engine.socket)
        status = await client.status()
        (loaded,) = status.bases
        assert (loaded.name, loaded.digest, loaded.family) == (base.name, base.digest, "llama")
        assert loaded.batch_invariant
        assert loaded.has_chat_template
        assert 1 <= loaded.min_rows <= MOST_ROWS
        assert (loaded.kv_tokens, status.threads) == (8192, 1)
        assert engine.process is not None
        assert status.pid == engine.process.pid
        await client.close()

    asyncio.run(talk())
    assert stat.S_IMODE(engine.socket.stat().st_mode) == 0o600


def test_32_requests_of_8_versions_get_what_each_gets_alone(
    engine: EngineProcess, versions: list[VersionRef]
) -> None:
    requests = [
        GenerateRequest(versions[n % 8], GREEDY, prompt="the city " * (1 + n % 5) + str(n))
        for n in range(32)
    ]

    async def talk() -> tuple[list[list[Piece]], list[list[Piece]], EngineStatus]:
        client = EngineClient(engine.socket)
        together = await asyncio.gather(*(collected(client, request) for request in requests))
        alone = [await collected(client, request) for request in requests]
        status = await settled(client)
        await client.close()
        return together, alone, status

    together, alone, status = asyncio.run(talk())
    assert together == alone, "text, tokens and log-probabilities to the last bit"
    texts = {"".join(piece.text for piece in pieces) for pieces in together[:8]}
    assert len(texts) > 4, "versions must differ"
    assert {version.stack_digest for version in status.versions} >= {
        version.stack_digest for version in versions
    }
    assert all(version.requests == 0 for version in status.versions)
    assert status.completion_tokens >= 2 * 32 * 16


def test_messages_go_through_the_chat_template(
    engine: EngineProcess, versions: list[VersionRef]
) -> None:
    async def talk() -> None:
        client = EngineClient(engine.socket)
        messages = ({"role": "user", "content": "the city"},)
        chat = await collected(client, GenerateRequest(versions[0], GREEDY, messages=messages))
        text = "user: the city\nassistant:"
        assert chat == await collected(client, GenerateRequest(versions[0], GREEDY, prompt=text))
        await client.close()

    asyncio.run(talk())


def test_what_cannot_be_is_refused_with_its_own_error(
    engine: EngineProcess, versions: list[VersionRef]
) -> None:
    async def talk() -> None:
        client = EngineClient(engine.socket)
        ok = GenerateRequest(versions[0], GREEDY, prompt="a")
        long = replace(ok, params=replace(GREEDY, max_tokens=5000))
        with pytest.raises(InvalidRequest) as caught:
            await collected(client, long)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_tokens")
        with pytest.raises(InvalidRequest, match="prompt token 0"):
            await collected(client, replace(ok, prompt=None, prompt_tokens=(10**6,)))
        other = replace(versions[0], base="other")
        with pytest.raises(VersionUnavailable, match="other"):
            await collected(client, replace(ok, version=other))
        assert len(await collected(client, ok)) == 16
        await client.close()

    asyncio.run(talk())


def test_a_corrupt_artifact_fails_its_own_requests_alone(
    engine: EngineProcess, base: Base, versions: list[VersionRef]
) -> None:
    bad = store_version(engine.store, base, {DOWN: random_effect(99, 64, 96, "rank3")})
    file = engine.folder / "data" / "artifacts" / bad.stack[0][:2] / bad.stack[0]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)

    async def talk() -> None:
        client = EngineClient(engine.socket)
        requests = [
            GenerateRequest(version, GREEDY, prompt="the city")
            for version in (versions[0], bad, versions[1], bad)
        ]
        found = await asyncio.gather(
            *(collected(client, request) for request in requests), return_exceptions=True
        )
        for failure in (found[1], found[3]):
            assert isinstance(failure, VersionUnavailable)
            assert bad.stack[0] in failure.message
        for fine in (found[0], found[2]):
            assert isinstance(fine, list)
            assert len(fine) == 16
        await settled(client)
        await client.close()

    asyncio.run(talk())


def test_a_version_is_warmed_without_being_held(engine: EngineProcess, base: Base) -> None:
    ref = store_version(engine.store, base, {DOWN: random_effect(98, 64, 96, "rank3")})

    async def talk() -> None:
        client = EngineClient(engine.socket)
        await client.warm(ref)
        await client.warm(ref)
        (held,) = [
            version
            for version in (await client.status()).versions
            if version.stack_digest == ref.stack_digest
        ]
        assert (held.depth, held.requests) == (1, 0)
        for missing in (replace(ref, base="another"), replace(ref, stack=("0" * 64,))):
            with pytest.raises(VersionUnavailable):
                await client.warm(missing)
        await client.close()

    asyncio.run(talk())


def test_a_closed_iterator_a_cancelled_task_and_a_lost_client_free_the_engine(
    engine: EngineProcess, versions: list[VersionRef]
) -> None:
    request = GenerateRequest(versions[1], ENDLESS, prompt="the city")

    async def talk() -> None:
        watcher, client = EngineClient(engine.socket), EngineClient(engine.socket)
        async with aclosing(client.generate(request)) as stream:
            await anext(stream)
            assert (await watcher.status()).bases[0].running == 1
        await settled(watcher)

        task = asyncio.create_task(collected(client, request))
        while not (await watcher.status()).bases[0].running:
            assert not task.done(), "it ended before it was seen to run"
            await asyncio.sleep(0.01)
        task.cancel()
        status = await settled(watcher)
        assert all(version.requests == 0 for version in status.versions)

        streams = [client.generate(request) for _ in range(3)]
        for stream in streams:
            await anext(stream)
        await client.close()
        await settled(watcher)
        for stream in streams:
            with pytest.raises(Unavailable):
                await exhausted(stream)
        await watcher.close()

    asyncio.run(talk())


def test_a_connection_that_talks_nonsense_harms_nobody(
    engine: EngineProcess, versions: list[VersionRef]
) -> None:
    async def talk() -> None:
        client = EngineClient(engine.socket)
        for nonsense in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"\0\0\0\2{}",
            b"\0\0\0\x0fnot json at all",
            b"x",
        ):
            reader, writer = await asyncio.open_unix_connection(str(engine.socket))
            writer.write(nonsense)
            writer.write_eof()
            assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()
        request = GenerateRequest(versions[0], GREEDY, prompt="a")
        assert len(await collected(client, request)) == 16
        await client.close()

    asyncio.run(talk())


def test_a_killed_engine_fails_what_it_had_and_serves_again(
    base: Base, engine: EngineProcess, versions: list[VersionRef]
) -> None:
    request = GenerateRequest(versions[1], GREEDY, prompt="the city")

    async def talk() -> None:
        client = EngineClient(engine.socket, wait_seconds=0.2)
        before = await collected(client, request)
        stream = client.generate(replace(request, params=ENDLESS))
        await anext(stream)
        engine.end(signal.SIGKILL)
        with pytest.raises(Unavailable, match="stopped while"):
            await exhausted(stream)
        assert engine.socket.exists(), "a killed engine leaves its socket"
        with pytest.raises(Unavailable, match="does not answer"):
            await collected(client, request)

        engine.start()
        patient = EngineClient(engine.socket, wait_seconds=60)
        assert await collected(patient, request) == before, "a request waits for the engine"
        assert await collected(client, request) == before, "the old client finds the new engine"
        await asyncio.gather(client.close(), patient.close())

    asyncio.run(talk())


#: An engine that loses its device at the first token it chooses.
LOSING = """
import torch
from serving.__main__ import main
def lost(*_):
    raise torch.AcceleratorError("CUDA error: device-side assert triggered")
torch.Tensor.argmax = lost
main()
"""


def test_an_engine_that_loses_its_device_ends(base: Base, tmp_path: Path) -> None:
    """Whoever started it then starts another; what ran is told to come again."""
    engine = EngineProcess(tmp_path, f"{base.name}={base.folder}", program=("-c", LOSING))
    request = GenerateRequest(store_version(engine.store, base), GREEDY, prompt="the city")

    async def talk() -> None:
        client = EngineClient(engine.socket)
        with pytest.raises(Unavailable, match="stopped while"):
            await collected(client, request)
        await client.close()

    engine.start()
    engine.wait_ready()
    asyncio.run(talk())
    assert engine.process is not None
    assert engine.process.wait(20) == 1
    assert "device-side assert" in engine.log
    assert not engine.socket.exists()


def test_a_base_that_cannot_be_served_is_refused_by_name(tmp_path: Path) -> None:
    engine = EngineProcess(tmp_path, f"mine={tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "bloom"}')
    engine.start()
    assert engine.process is not None
    assert engine.process.wait(60) == 1
    assert "mine" in engine.log
    assert "bloom" in engine.log
    assert "Traceback" not in engine.log


def test_it_ends_when_told_while_it_still_loads(base: Base, tmp_path: Path) -> None:
    engine = EngineProcess(tmp_path, f"{base.name}={base.folder}")
    engine.start()
    while not list(tmp_path.glob("engine.sock*")):
        time.sleep(0.01)
    assert engine.end() == 0
    assert [file.name for file in tmp_path.iterdir()] == ["log"]


def test_a_socket_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="ERRATA_RUNTIME"):
        SocketFile(tmp_path / ("x" * 100))


def test_a_bases_queue_is_its_own(base: Base, tmp_path: Path) -> None:
    """Requests on their way to one base take no place before another."""
    other = replace(base, name="other")
    settings = {"ERRATA_MAX_WAITING": "2", "ERRATA_MAX_RUNNING": "1"}
    names = f"{base.name}={base.folder},other={base.folder}"
    engine = EngineProcess(tmp_path, names, settings)
    requests = [
        GenerateRequest(store_version(engine.store, of), GREEDY, prompt="the city " * 30)
        for of in (*[base] * 16, other)
    ]

    async def talk() -> list[object]:
        client = EngineClient(engine.socket)
        await client.status()
        calls = (collected(client, request) for request in requests)
        ended: list[object] = await asyncio.gather(*calls, return_exceptions=True)
        await client.close()
        return ended

    engine.start()
    engine.wait_ready()
    first, *others, elsewhere = asyncio.run(talk())
    assert engine.end() == 0, engine.log
    assert [type(answer) for answer in (first, elsewhere)] == [list] * 2
    refused = [answer for answer in others if not isinstance(answer, list)]
    assert refused
    for error in refused:
        assert isinstance(error, TooManyRequests)
        assert (error.code, f"base {base.name!r}" in error.message) == ("engine_full", True)
        assert error.retry_after is not None


#: An engine that takes its time for each token until there is the file ``go`` beside its socket.
SLOW = """
import pathlib, sys, time, torch
from serving.__main__ import main
choose, go = torch.Tensor.argmax, pathlib.Path(sys.argv[2]).with_name("go")
def slow(*arguments, **named):
    if not go.exists():
        time.sleep(0.2)
    return choose(*arguments, **named)
torch.Tensor.argmax = slow
main()
"""

PARENT = """
import os, pathlib, sys
from serving.socket_file import SocketFile
from serving.status import EngineStatus
from tests.unit.serving.engines import EngineProcess
settings = {"ERRATA_MAX_RUNNING": "1", "ERRATA_MAX_WAITING": "2", "ERRATA_STEP_TOKENS": "16"}
engine = EngineProcess(pathlib.Path(sys.argv[1]), sys.argv[2], settings, ("-c", sys.argv[3]))
engine.start("--parent", str(os.getpid()))
sys.stdin.read()
os._exit(0)
"""


def test_a_full_queue_turns_away_and_the_engine_ends_with_its_parent(
    base: Base, tmp_path: Path
) -> None:
    """One runs, two wait, the fourth is sent away; and a step's budget of 16 tokens is enough."""
    engine = EngineProcess(tmp_path, f"{base.name}={base.folder}")
    request = GenerateRequest(
        store_version(engine.store, base), replace(ENDLESS, max_tokens=100), prompt="the city " * 20
    )

    async def talk() -> None:
        client = EngineClient(engine.socket, wait_seconds=60)
        tasks = []
        for running, waiting in ((1, 0), (1, 1), (1, 2)):
            tasks.append(asyncio.create_task(collected(client, request)))
            seen = (await client.status()).bases[0]
            while (seen.running, seen.waiting) != (running, waiting):
                assert not any(task.done() for task in tasks), seen
                await asyncio.sleep(0.01)
                seen = (await client.status()).bases[0]
        with pytest.raises(TooManyRequests) as caught:
            await collected(client, request)
        assert caught.value.retry_after is not None
        assert 1 <= caught.value.retry_after <= 60
        (tmp_path / "go").touch()
        first, *others = (
            [piece.tokens for piece in pieces] for pieces in await asyncio.gather(*tasks)
        )
        assert len(first) == 100
        assert others == [first, first]
        await client.close()

    command = [sys.executable, "-c", PARENT, str(tmp_path), engine.bases, SLOW]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as parent:
        asyncio.run(talk())
        parent.kill()
    end = time.monotonic() + 60
    while engine.socket.exists():
        assert time.monotonic() < end, engine.log
        time.sleep(0.05)
