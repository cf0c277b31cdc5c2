"""The engine loads what an endpoint moved to: by a notice, and by looking where none came."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

import app.follower
from app.follower import Follower
from registry.bases import Base
from registry.bootstrap import bootstrap
from registry.database import Database
from registry.endpoints import create_endpoint, delete_endpoint, list_moved
from registry.moves import Target
from registry.versions import get_version
from serving.client import EngineClient
from serving.protocol import VersionRef
from tests.models import add_version, save_base
from tests.unit.serving.engines import EngineProcess
from workers.connection import connect
from workers.embedded import EmbeddedQueue
from workers.notices import CHANNEL, Notices

NEVER, SOON = 3600.0, 0.05


@dataclass
class World:
    """A database, a queue, and an engine of one small base that a test may start."""

    base: Base
    engine: EngineProcess
    database: Database
    queue: EmbeddedQueue

    def endpoint(self, name: str) -> VersionRef:
        """A new endpoint at a new version, of which no notice is given."""
        seed = sum(map(ord, name))
        version = add_version(self.engine.folder / "data", self.base, seed)
        with self.database.write() as connection:
            create_endpoint(connection, "default", name, (Target(version),), actor="test")
            return VersionRef.of(get_version(connection, "default", version).manifest)

    @asynccontextmanager
    async def follower(self) -> AsyncIterator[EngineClient]:
        client = EngineClient(self.engine.socket, wait_seconds=0.1)
        follower = Follower(
            self.database, {self.base.name: self.base}, client, Notices(self.queue.url)
        )
        task = asyncio.create_task(follower.run())
        try:
            yield client
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await client.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.02)


async def until_resident(client: EngineClient, ref: VersionRef) -> None:
    async with asyncio.timeout(30):
        while not await is_resident(client, ref):
            await asyncio.sleep(0.02)


async def is_resident(client: EngineClient, ref: VersionRef) -> bool:
    """Whether it is there, and warming it holds nothing any more."""
    requests = {
        version.stack_digest: version.requests for version in (await client.status()).versions
    }
    return requests.get(ref.stack_digest) == 0


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    base = save_base(tmp_path / "llama", "llama")
    database = Database(f"sqlite:///{tmp_path / 'data' / 'registry.db'}")
    bootstrap(database, [base])
    with tempfile.TemporaryDirectory(prefix="eq") as short:
        queue = EmbeddedQueue(tmp_path / "queue", Path(short) / "q")
        queue.start()
        queue.wait_ready()
        engine = EngineProcess(tmp_path, f"llama={base.folder}")
        try:
            yield World(base, engine, database, queue)
        finally:
            if engine.process is not None:
                engine.end()
            queue.stop()
            database.close()


def test_a_notice_is_enough(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.follower, "POLL_SECONDS", NEVER)
    before = world.endpoint("before")
    world.engine.start()
    world.engine.wait_ready()
    redis = connect(world.queue.url)

    async def talk() -> None:
        async with world.follower() as client:
            await until_resident(client, before)
            await until(lambda: redis.pubsub_numsub(CHANNEL)[0][1] == 1)
            after = world.endpoint("after")
            assert not await is_resident(client, after)
            Notices(world.queue.url).publish()
            await until_resident(client, after)

    asyncio.run(talk())


def test_notices_are_heard_again_after_the_queue_was_away(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.follower, "POLL_SECONDS", NEVER)
    world.engine.start()
    world.engine.wait_ready()

    async def talk() -> None:
        async with world.follower() as client:
            world.queue.stop()
            Notices(world.queue.url).publish()
            world.queue.start()
            await asyncio.to_thread(world.queue.wait_ready)
            redis = connect(world.queue.url)
            await until(lambda: redis.pubsub_numsub(CHANNEL)[0][1] == 1)
            after = world.endpoint("after")
            Notices(world.queue.url).publish()
            await until_resident(client, after)

    asyncio.run(talk())


def test_without_queue_and_notices_it_looks_by_itself_and_waits_for_the_engine(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.follower, "POLL_SECONDS", SOON)
    world.queue.stop()
    before = world.endpoint("before")

    async def talk() -> None:
        async with world.follower() as client:
            await asyncio.sleep(0.3)
            world.engine.start()
            await asyncio.to_thread(world.engine.wait_ready)
            await until_resident(client, before)
            await until_resident(client, world.endpoint("after"))

    asyncio.run(talk())


def test_a_version_that_does_not_load_holds_up_no_later_move(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(app.follower, "WARM_SECONDS", 1.0)
    armed = tmp_path / "failpoints" / "loading"
    armed.parent.mkdir()
    armed.write_text("0")
    world.engine.settings["ERRATA_FAILPOINTS"] = str(armed.parent)
    world.engine.start()
    world.engine.wait_ready()
    stuck = world.endpoint("stuck")

    async def talk() -> None:
        async with world.follower() as client:
            await until(lambda: not armed.exists())
            await until_resident(client, world.endpoint("after"))
            assert not await is_resident(client, stuck)
            (held,) = armed.parent.iterdir()
            held.unlink()
            await until_resident(client, stuck)

    asyncio.run(talk())
    assert f"version {stuck.id} is not loaded after 1 s" in caplog.text


def test_what_moved_is_what_is_at_another_generation(world: World) -> None:
    world.endpoint("a")
    world.endpoint("b")
    with world.database.write() as connection:
        everything = {(e.tenant, e.name): e.generation for e in list_moved(connection, {})}
        assert set(everything) == {("default", name) for name in ("llama", "a", "b")}
        assert list_moved(connection, everything) == []
        (moved,) = list_moved(connection, {**everything, ("default", "b"): 0})
        assert moved.name == "b"
        delete_endpoint(connection, "default", "a", generation=1, actor="test")
        assert {e.name for e in list_moved(connection, {})} == {"llama", "b"}


def test_a_database_that_is_away_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    database = Database(f"sqlite:///{tmp_path}")

    async def follow() -> None:
        engine = EngineClient(tmp_path / "none", wait_seconds=0.1)
        follower = Follower(database, {}, engine, Notices(f"unix://{tmp_path}/none"))
        task = asyncio.create_task(follower._follow())
        await until(lambda: caplog.text)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await engine.close()

    asyncio.run(follow())
    database.close()
    told = "the database does not answer: sqlite3.OperationalError: unable to open database file"
    assert told in caplog.text


def test_a_follower_that_hears_of_a_move_as_it_is_cancelled_ends(
    database: Database, tmp_path: Path
) -> None:
    async def hear_and_cancel() -> None:
        engine = EngineClient(tmp_path / "none", wait_seconds=0.1)
        follower = Follower(database, {}, engine, Notices(f"unix://{tmp_path}/none"))
        task = asyncio.create_task(follower._follow())
        await asyncio.sleep(0.3)
        follower._heard.set()
        task.cancel()
        async with asyncio.timeout(10):
            with pytest.raises(asyncio.CancelledError):
                await task
        await engine.close()

    asyncio.run(hear_and_cancel())
