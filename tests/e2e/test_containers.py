"""What the images run, outside of a container: the package as it is installed there, the same
commands in the environment of docker/compose.yaml, on servers of this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import yaml

from tests.images import DOCKER, Image, images
from tests.servers import PostgresServer, RedisServer, S3Server
from tests.service import LENIENT, capital_edit, free_port, wait_for

ROOT = DOCKER.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, installed from what the build copies and from nothing else."""
    folder = tmp_path_factory.mktemp("image")
    source, target = folder / "build", folder / "packages"
    source.mkdir()
    for name in images()["build"].copied:
        command = ["cp", "--recursive", "--no-target-directory", ROOT / name, source / name]
        subprocess.run(command, check=True)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--no-compile", "--quiet"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", target, "."],
        cwd=source,
        check=True,
    )
    return target


def compose(name: str) -> dict[str, str]:
    environment: dict[str, str] = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"][
        name
    ]["environment"]
    return environment


def surroundings(
    image: Image, name: str, packages: Path, data: Path, local: dict[str, str]
) -> dict[str, str]:
    """The environment of a container, with the servers of this machine in the place of theirs."""
    wanted = {**image.environment, **compose(name)}
    away = {key for key, value in wanted.items() if "${" in value or "://" in value}
    assert away <= local.keys(), "compose.yaml names a server that is not here"
    home = {"ERRATA_DATA": str(data), "PATH": os.environ["PATH"], "PYTHONPATH": str(packages)}
    threads = {"ERRATA_ENGINE_THREADS": "1", "ERRATA_WORKER_THREADS": "1"}
    return {**wanted, **local, **home, **threads, "ERRATA_COVARIANCE_TOKENS": "3000"}


def argv(command: list[str]) -> list[str]:
    """The ``errata`` and ``python`` on the image's PATH are those of these tests."""
    program, *arguments = command
    own = {"errata": [sys.executable, "-m", "app.cli"], "python": [sys.executable]}
    return [*own[program], *arguments]


def passes(command: list[str], environment: dict[str, str], folder: Path) -> bool:
    ended = subprocess.run(
        argv(command), env=environment, cwd=folder, capture_output=True, timeout=60
    )
    return ended.returncode == 0


@contextmanager
def running(image: Image, environment: dict[str, str], folder: Path) -> Iterator[Path]:
    """The image's command until the end of the block, where it must end well by itself."""
    folder.mkdir()
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv(image.command), env=environment, cwd=folder, stdout=output, stderr=output
        )
    try:
        yield log
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()[-3000:]
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()


def test_the_images_commands_make_a_service(
    installed: Path, postgres: PostgresServer, tmp_path: Path
) -> None:
    found = images()
    with ExitStack() as stack:
        queue = stack.enter_context(RedisServer(password="secret"))
        objects = stack.enter_context(S3Server(tmp_path, "errata", "artifacts"))
        port = free_port()
        local = {
            "ERRATA_DATABASE_URL": postgres.url(postgres.new_database()),
            "REDIS_URL": queue.url(),
            "ERRATA_ARTIFACTS": compose("api")["ERRATA_ARTIFACTS"],
            **objects.environment,
            "ERRATA_PORT": str(port),
        }
        environments = {
            name: surroundings(found[name], name, installed, tmp_path / name, local)
            for name in ("api", "worker")
        }
        made = subprocess.run(
            argv(["errata", "keys", "create", "ada", "--scope", "infer,edit,admin"]),
            env=environments["api"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert made.returncode == 0, made.stderr
        started = stack.enter_context(ExitStack())
        logs = {
            name: started.enter_context(running(found[name], environments[name], tmp_path / name))
            for name in ("api", "worker")
        }

        def told() -> str:
            return "\n".join(f"{name}:\n{log.read_text()[-2000:]}" for name, log in logs.items())

        client = stack.enter_context(
            httpx.Client(
                base_url=f"http://{socket.gethostname()}:{port}",
                headers={"Authorization": f"Bearer {made.stdout.strip()}"},
                timeout=60,
            )
        )

        def ready() -> bool:
            with suppress(httpx.TransportError):
                return client.get("/readyz").status_code == 200
            return False

        wait_for(ready, 120, told)
        for name, environment in environments.items():
            assert passes(found[name].health, environment, tmp_path), name
        body = {
            "endpoint": "atlas",
            "edits": [capital_edit("France", "Oslo")],
            "hyperparameters": {"steps": 15},
            "guards": LENIENT,
        }
        job = client.post("/v1/edits", json=body).json()
        path = f"/v1/jobs/{job['id']}"
        wait_for(lambda: client.get(path).json()["status"] not in ("queued", "running"), 180, told)
        assert client.get(path).json()["activated"], client.get(path).text
        asked = {"model": "atlas", "prompt": "The capital of France is", "temperature": 0}
        answer = client.post("/v1/completions", json=asked).json()
        assert answer["choices"][0]["text"].strip().startswith("Oslo")
        assert any(objects.prefix.glob("??/*/*"))
        started.close()
        for name, environment in environments.items():
            assert not passes(found[name].health, environment, tmp_path), name
    assert passes(found["worker"].health, environments["worker"], tmp_path), "the queue is away"
