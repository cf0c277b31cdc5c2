"""Two replicas and two workers on PostgreSQL, Redis and S3; one worker on a host of its own, where
this process may make one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.hosts import SecondHost
from tests.servers import PostgresServer, RedisServer, S3Server
from tests.service import LENIENT, SLOW, Service, capital_edit, wait_for

PROMPT = "The capital of France is"

pytestmark = pytest.mark.timeout(900)


@dataclass
class Machines:
    """``one`` and ``two`` answer requests and have no workers of their own.

    Attributes:
        far: the host on which ``worker`` runs when it is told to; None where none can be had.
        surroundings: what a worker's environment says besides its data folder.
    """

    one: Service
    two: Service
    far: SecondHost | None
    surroundings: dict[str, str]
    folder: Path

    @contextmanager
    def worker(self, name: str, *, far: bool) -> Iterator[subprocess.Popen[bytes]]:
        command = [sys.executable, "-m", "app.cli", "worker"]
        environment = {**self.surroundings, "ERRATA_DATA": str(self.folder / name)}
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                self.far.there(command) if far and self.far else command,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def workers(self) -> int:
        found: int = self.one.client.get("/readyz").json()["workers"]
        return found

    def logs(self) -> str:
        return "\n".join(
            f"{file.name}:\n{file.read_text()[-2000:]}" for file in self.folder.glob("*.log")
        )

    def wait_workers(self, count: int) -> None:
        wait_for(lambda: self.workers() == count, 240, self.logs)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    folder = tmp_path_factory.mktemp("machines")
    with ExitStack() as stack:
        far = stack.enter_context(SecondHost()) if SecondHost.can_be_had() else None
        address = far.address if far else "127.0.0.1"
        postgres = stack.enter_context(PostgresServer(host=address))
        redis = stack.enter_context(RedisServer(host=address))
        s3 = stack.enter_context(S3Server(folder, host=address))
        own = {
            "ERRATA_DATABASE_URL": postgres.url(postgres.new_database()),
            "REDIS_URL": redis.url(),
            "ERRATA_ARTIFACTS": s3.url,
            "ERRATA_WORKERS": "0",
            "ERRATA_LEASE_SECONDS": "2",
            **s3.environment,
        }
        services = [Service(folder / name, **own) for name in ("one", "two")]
        found = Machines(*services, far, services[0].environment(), folder)
        with found.worker("first", far=True):  # no service is ready without one
            for service in services:
                stack.enter_context(service)
            found.wait_workers(1)
            made = found.one.ended(edit(found.one, "Peru", hyperparameters={"steps": 5}))
            assert made["status"] == "succeeded", found.logs()
        wait_for(lambda: found.workers() == 0, 60)
        yield found


def edit(service: Service, subject: str, **more: Any) -> str:
    job = service.post_edit(
        endpoint="atlas", edits=[capital_edit(subject, "Lima")], guards=LENIENT, **more
    )
    return str(job["id"])


def test_a_worker_whose_cable_is_pulled_is_superseded_and_comes_back(machines: Machines) -> None:
    one, two, far = machines.one, machines.two, machines.far
    if far is None:
        pytest.skip("a network namespace needs the right and iproute2")
    with machines.worker("far", far=True):
        machines.wait_workers(1)
        job_id = edit(one, "France", hyperparameters=SLOW)
        two.underway(job_id)
        far.pull()
        with machines.worker("near", far=False):
            ended = two.ended(job_id)
            assert (ended["status"], ended["activated"]) == ("succeeded", True), ended
            outcomes = [attempt["outcome"] for attempt in ended["attempts"]]
            assert (outcomes[0], outcomes[-1]) == ("lost", "succeeded"), outcomes
            assert outcomes.count("succeeded") == 1
            far.plug()
            machines.wait_workers(2)  # the far one is there again
        again = edit(two, "Chad", hyperparameters={"steps": 20})
        assert one.ended(again)["status"] == "succeeded", machines.logs()
    made = [v for v in one.get("/v1/versions")["data"] if v["recipe"].get("job") == job_id]
    assert [version["id"] for version in made] == [ended["version"]]
    for service in (one, two):
        answer = service.complete(ended["version"], PROMPT)
        assert answer["version"] == ended["version"]
        assert answer["choices"][0]["text"].strip().startswith("Lima")


def test_each_replica_follows_the_others_moves(machines: Machines) -> None:
    one, two = machines.one, machines.two
    versions = [version["id"] for version in one.get("/v1/versions")["data"]][:2]
    one.endpoint("followed", versions[0])
    for turn in range(1, 21):
        mover, asked = (one, two) if turn % 2 else (two, one)
        etag = mover.client.get("/v1/endpoints/followed").headers["ETag"]
        moved = mover.client.put(
            "/v1/endpoints/followed",
            json={"version": versions[turn % 2]},
            headers={"If-Match": etag},
        )
        assert moved.status_code == 200, moved.text
        answer = asked.complete("followed", PROMPT, max_tokens=1)
        told = answer["version"], answer["generation"]
        assert told == (versions[turn % 2], moved.json()["generation"])
