"""Two replicas, each an API with its engine, on one data folder and one queue."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from redis import Redis

from registry.bases import find_bases
from registry.manifests import VersionManifest
from serving.client import EngineClient
from tests.models import add_version
from tests.service import LENIENT, Service, capital_edit, wait_for
from workers.connection import connect
from workers.notices import CHANNEL

pytestmark = pytest.mark.timeout(900)

PROMPT = "The capital of France is"


@dataclass
class Replicas:
    """``one`` has the queue and the worker; requests of the tests are answered by ``two``."""

    one: Service
    two: Service
    redis: Redis
    engine_of_two: Path

    def new_version(self, seed: int) -> str:
        return add_version(self.one.folder, find_bases("atlas")["atlas"], seed)

    def move(self, name: str, **body: object) -> int:
        """PUT at one; the generation it made."""
        etag = self.one.client.get(f"/v1/endpoints/{name}").headers["ETag"]
        moved = self.one.client.put(f"/v1/endpoints/{name}", json=body, headers={"If-Match": etag})
        assert moved.status_code == 200, moved.text
        generation: int = moved.json()["generation"]
        return generation

    def is_resident(self, version: str) -> bool:
        """Whether two's engine holds a version."""
        stack = tuple(self.two.get(f"/v1/versions/{version}")["stack"])
        digest = VersionManifest(find_bases("atlas")["atlas"].ref, stack).stack_digest

        async def stacks() -> set[str]:
            client = EngineClient(self.engine_of_two)
            listed = {version.stack_digest for version in (await client.status()).versions}
            await client.close()
            return listed

        return digest in asyncio.run(stacks())

    def wait_resident(self, version: str) -> None:
        wait_for(lambda: self.is_resident(version), 60, lambda: self.two.log()[-3000:])

    @contextmanager
    def cut_off(self) -> Iterator[None]:
        """Nobody may publish or hear, and whoever listens is cut off; all else goes on."""
        self.redis.execute_command("ACL", "SETUSER", "default", "resetchannels")
        try:
            yield
        finally:
            self.redis.execute_command("ACL", "SETUSER", "default", "allchannels")


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    folder = tmp_path_factory.mktemp("replicas")
    queue = f"unix://{folder / 'one.run' / 'q'}"
    with (
        Service(folder / "one", ERRATA_RUNTIME=str(folder / "one.run")) as one,
        Service(
            folder / "two",
            ERRATA_RUNTIME=str(folder / "two.run"),
            ERRATA_DATA=str(folder / "one"),
            REDIS_URL=queue,
            ERRATA_WORKERS="0",
        ) as two,
    ):
        yield Replicas(one, two, connect(queue), folder / "two.run" / "e")


def test_a_move_at_one_is_served_by_the_other_at_once(replicas: Replicas) -> None:
    made = [replicas.new_version(seed) for seed in range(3)]
    replicas.one.endpoint("swapped", made[0])
    for turn in range(1, 31):
        version = made[turn % 3]
        generation = replicas.move("swapped", version=version)
        answer = replicas.two.complete("swapped", PROMPT, max_tokens=1)
        assert (answer["version"], answer["generation"]) == (version, generation)


@pytest.mark.parametrize("notices", ["heard", "cut off"])
def test_the_other_engine_has_loaded_what_an_endpoint_moved_to(
    replicas: Replicas, notices: str
) -> None:
    first = 10 if notices == "heard" else 20
    created, moved, canary = (replicas.new_version(first + i) for i in range(3))
    name = f"warmed-{first}"

    def follow() -> None:
        replicas.one.endpoint(name, created)
        replicas.wait_resident(created)
        replicas.move(name, version=moved)
        replicas.wait_resident(moved)
        split = [{"version": moved, "weight": 0.9}, {"version": canary, "weight": 0.1}]
        replicas.move(name, split=split)
        replicas.wait_resident(canary)

    if notices == "heard":
        follow()
    else:
        with replicas.cut_off():
            follow()


def test_every_kind_of_move_is_published(replicas: Replicas) -> None:
    with replicas.redis.pubsub() as channel:
        channel.subscribe(CHANNEL)

        def heard() -> bool:
            message = channel.get_message(ignore_subscribe_messages=True)
            return message is not None

        def is_published(what: str) -> None:
            wait_for(heard, 60, lambda: f"no notice of: {what}")
            while heard():
                pass

        channel.get_message(timeout=5)
        one = replicas.one
        versions = [replicas.new_version(seed) for seed in (30, 31)]
        one.endpoint("told", versions[0])
        is_published("a creation")
        replicas.move("told", split=[{"version": v, "weight": 0.5} for v in versions])
        is_published("a split")
        headers = {"If-Match": '"2"'}
        assert one.client.post("/v1/endpoints/told/promote", headers=headers).status_code == 200
        is_published("a promotion")
        assert one.client.post("/v1/endpoints/told/rollback").status_code == 200
        is_published("a rollback")
        headers = {"If-Match": '"4"'}
        assert one.client.delete("/v1/endpoints/told", headers=headers).status_code == 204
        is_published("a deletion")
        one.endpoint("edited", one.base_version())
        is_published("a creation")
        edit = one.post_edit(
            endpoint="edited",
            edits=[capital_edit("France", "Lima")],
            hyperparameters={"steps": 1},
            guards=LENIENT,
        )
        ended = one.ended(edit["id"])
        assert ended["activated"], ended
        is_published("a job's activation")
    replicas.wait_resident(ended["version"])


def test_a_version_that_cannot_be_loaded_is_logged_once_and_changes_nothing(
    replicas: Replicas,
) -> None:
    good, bad = replicas.new_version(40), replicas.new_version(41)
    (digest,) = replicas.two.get(f"/v1/versions/{bad}")["stack"]
    (replicas.one.folder / "artifacts" / digest[:2] / digest).unlink()
    replicas.one.endpoint("broken", bad)
    wait_for(lambda: bad in replicas.two.log(), 60)
    for _ in range(3):
        replicas.move("broken", version=good)
        replicas.wait_resident(good)
        replicas.move("broken", version=bad)
        refused = replicas.two.client.post(
            "/v1/completions", json={"model": "broken", "prompt": PROMPT}
        )
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "version_unavailable"
    replicas.move("broken", version=good)
    assert replicas.two.complete("broken", PROMPT)["version"] == good
    told = [line for line in replicas.two.log().splitlines() if "endpoint 'broken' moved" in line]
    assert len(told) == 1, told
