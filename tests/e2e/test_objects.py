"""Two machines, each with a data folder and an engine of its own, on one bucket."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from registry.artifacts import ArtifactStore
from tests.servers import S3Server
from tests.service import LENIENT, SLOW, Service, capital_edit, wait_for

pytestmark = pytest.mark.timeout(900)

PROMPT = "The capital of France is"


@dataclass
class Machines:
    """``one`` has the database, the queue and the worker."""

    s3: S3Server
    one: Service
    two: Service

    def edit(self, target: str) -> tuple[str, str]:
        """An edit on the endpoint; its version and its delta."""
        job = self.one.post_edit(
            endpoint="atlas",
            edits=[capital_edit("France", target)],
            guards=LENIENT,
        )
        ended = self.one.ended(job["id"])
        assert (ended["status"], ended["activated"]) == ("succeeded", True), ended
        delta: str = self.one.get(f"/v1/versions/{ended['version']}")["stack"][-1]
        return ended["version"], delta

    def command(self, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The command on a third machine, which has nothing yet."""
        environment = {**self.two.environment(), "ERRATA_DATA": str(folder)}
        command = [sys.executable, "-m", "app.cli", *arguments]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=180, check=False
        )


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    folder = tmp_path_factory.mktemp("machines")
    s3 = S3Server(folder)
    settings = {
        **s3.environment,
        "ERRATA_ARTIFACTS": s3.url,
        "ERRATA_ARTIFACTS_PATIENCE": "5",
        "ERRATA_COVARIANCE_TOKENS": "3000",
    }
    one = Service(
        folder / "one",
        ERRATA_RUNTIME=str(folder / "one.run"),
        **settings,
    )
    two = Service(
        folder / "two",
        ERRATA_DATABASE_URL=f"sqlite:///{folder / 'one' / 'registry.db'}",
        REDIS_URL=f"unix://{folder / 'one.run' / 'q'}",
        ERRATA_WORKERS="0",
        **settings,
    )

    def start_late() -> None:
        log = one.folder / "serve.log"
        wait_for(lambda: log.exists() and "waiting for the object store" in one.log(), 120)
        s3.start()

    late = threading.Thread(target=start_late)
    late.start()
    try:
        with one, two:
            yield Machines(s3, one, two)
    finally:
        late.join()
        s3.kill()


def cached(service: Service, digest: str) -> Path:
    return service.folder / "cache" / digest[:2] / digest


def test_an_object_store_that_starts_late_is_waited_for(machines: Machines) -> None:
    assert f"waiting for the object store {machines.s3.url}" in machines.one.log()


def test_an_edit_at_one_machine_is_served_by_the_other(machines: Machines, tmp_path: Path) -> None:
    version, delta = machines.edit("Lima")
    for service in (machines.one, machines.two):
        answer = service.complete("atlas", PROMPT)
        assert answer["version"] == version
        assert answer["choices"][0]["text"].strip().startswith("Lima")
        assert cached(service, delta).is_file()
        assert not (service.folder / "artifacts").exists()
    exported = machines.command(
        tmp_path, "export", version, "--format", "errata", "--output", str(tmp_path / "out")
    )
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "out" / f"{version}.zip").is_file()
    collected = machines.command(tmp_path, "gc", "--grace", "0")
    assert collected.returncode == 0, collected.stderr
    assert machines.s3.copies(delta)


def test_a_machine_that_lost_its_cache_answers_after_a_restart(machines: Machines) -> None:
    version, delta = machines.edit("Oslo")
    machines.one.stop()
    shutil.rmtree(machines.one.folder / "cache")
    machines.one.start()
    answer = machines.one.complete("atlas", PROMPT)
    assert answer["version"] == version
    assert answer["choices"][0]["text"].strip().startswith("Oslo")
    assert cached(machines.one, delta).is_file()


def test_one_flipped_bit_in_the_bucket_is_refused_at_load(machines: Machines) -> None:
    version, delta = machines.edit("Rome")
    copies = machines.s3.copies(delta)
    whole = copies[0].read_bytes()
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 1
    for copy in copies:
        copy.write_bytes(damaged)
    shutil.rmtree(machines.one.folder / "cache")
    machines.one.kill("engine")
    refused: dict[str, str] = {}

    def is_refused() -> bool:
        body = {"model": "atlas", "prompt": PROMPT}
        answer = machines.one.client.post("/v1/completions", json=body)
        assert answer.status_code == 503, answer.text
        refused.update(answer.json()["error"])
        return refused["code"] == "version_unavailable"  # until then no engine is there

    wait_for(is_refused, 120)
    assert delta in refused["message"]
    copies[0].write_bytes(whole)
    assert machines.one.complete("atlas", PROMPT)["version"] == version


def test_a_store_that_is_killed_and_comes_back_fails_no_job(machines: Machines) -> None:
    before = machines.one.complete("atlas", PROMPT)["version"]
    job = machines.one.post_edit(
        endpoint="atlas",
        edits=[capital_edit("France", "Lima")],
        hyperparameters=SLOW,
        guards=LENIENT,
    )
    machines.one.underway(job["id"])
    machines.s3.kill()
    upload = {"files": {"file": ("a.txt", b"a text")}, "data": {"purpose": "texts"}}
    refused = machines.one.client.post("/v1/files", **upload)  # type: ignore[arg-type]
    assert refused.status_code == 503, refused.text
    assert refused.json()["error"]["code"] == "store_unavailable"
    assert machines.one.complete("atlas", PROMPT)["version"] == before

    def has_waited() -> bool:
        outcomes = [a["outcome"] for a in machines.one.job(job["id"])["attempts"]]
        return "interrupted" in outcomes

    wait_for(has_waited, 180, lambda: machines.one.log()[-3000:])
    machines.s3.start()
    ended = machines.one.ended(job["id"])
    assert (ended["status"], ended["activated"]) == ("succeeded", True), ended
    assert machines.one.complete("atlas", PROMPT)["version"] == ended["version"]
    assert machines.one.client.post("/v1/files", **upload).status_code < 300  # type: ignore[arg-type]


def test_a_folder_is_uploaded(machines: Machines, tmp_path: Path) -> None:
    folder = ArtifactStore(tmp_path / "artifacts")
    whole, damaged = folder.put(b"whole"), folder.put(b"damaged")
    folder.file(damaged).write_bytes(b"Damaged")
    for count in (1, 2):
        uploaded = machines.command(tmp_path, "upload", str(tmp_path / "artifacts"))
        assert uploaded.returncode == 1
        assert uploaded.stdout == "1 artifacts were put\n"
        assert damaged in "".join(uploaded.stderr.split())
        assert len(machines.s3.copies(whole)) == count
    assert machines.s3.copies(damaged) == []
    nothing = machines.command(tmp_path, "upload", str(tmp_path / "nowhere"))
    assert "is no folder" in " ".join(nothing.stderr.split())


@pytest.mark.parametrize(
    ("artifacts", "message"),
    [("s3://nobody/there", "create the bucket"), ("ftp://host/there", "s3://, gs://, az://")],
)
def test_a_store_that_cannot_work_ends_the_start_with_one_line(
    machines: Machines, tmp_path: Path, artifacts: str, message: str
) -> None:
    environment = {**machines.one.environment(), "ERRATA_DATA": str(tmp_path), "ERRATA_PORT": "0"}
    ended = subprocess.run(
        [sys.executable, "-m", "app.cli", "serve"],
        env={**environment, "ERRATA_ARTIFACTS": artifacts},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 1
    assert "ERRATA_ARTIFACTS" in ended.stderr
    assert message in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr
