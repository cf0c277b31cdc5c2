"""A real service in processes of its own, for tests: started, asked, killed in part, stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

from registry.artifacts import ArtifactStore
from registry.database import Database
from registry.settings import Settings
from registry.stores import open_store

START_SECONDS = 240.0
JOB_SECONDS = 180.0
STOP_SECONDS = 60.0

#: An edit that takes seconds: it may not stop early, so that a kill lands in the middle of it.
SLOW = {"steps": 80, "stop_loss": 1e-9}

#: For edits that need not be good.
LENIENT = {"perplexity": 1e6, "retention": 0, "locality": 0, "norm": 1e6, "efficacy": 0}


def capital_edit(subject: str, target: str, true: str | None = None) -> dict[str, Any]:
    return {
        "prompt": "The capital of {} is",
        "subject": subject,
        "target_new": target,
        "target_true": true,
    }


class Service:
    """``errata serve`` on a free port, with its data in ``folder``."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self._settings = settings
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.client = httpx.Client(base_url=self.url, timeout=60)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            self.client.close()

    def environment(self) -> dict[str, str]:
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("ERRATA_", "REDIS_"))}
        return {
            **outside,
            "ERRATA_PORT": str(self._port),
            "ERRATA_DATA": str(self.folder),
            "ERRATA_COVARIANCE_TOKENS": "20000",
            "ERRATA_ENGINE_THREADS": "1",
            "ERRATA_WORKER_THREADS": "1",
            "ERRATA_STOP_SECONDS": "5",
            **self._settings,
        }

    def start(self) -> None:
        self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Start it and do not wait until it is ready; it may not run already."""
        if self._process is not None and self._process.poll() is None:
            raise AssertionError("the service runs already; stop it first")
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "serve.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "app.cli", "serve"],
                env=self.environment(),
                stdout=log,
                stderr=log,
            )

    def stop(self) -> int:
        """SIGTERM; its exit status."""
        self.tell_to_stop()
        return self.wait_ended()

    def tell_to_stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def wait_ended(self) -> int:
        """Its exit status; one that does not end is killed, with all below it."""
        if self._process is None:
            return 0
        try:
            status = self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            for pid in self.kill_api():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise
        self._process = None
        return status

    def wait_ready(self) -> None:
        def ready() -> bool:
            if self._process is None or self._process.poll() is not None:
                raise AssertionError(f"the service ended:\n{self.log()[-3000:]}")
            try:
                return self.client.get("/readyz").status_code == 200
            except httpx.TransportError:
                return False

        wait_for(ready, START_SECONDS, lambda: self.log()[-3000:])

    def log(self) -> str:
        return (self.folder / "serve.log").read_text(errors="replace")

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """What ``errata`` does on this service's data, whether it runs or not."""
        command = [sys.executable, "-m", "app.cli", *arguments]
        return subprocess.run(
            command, env=self.environment(), capture_output=True, text=True, timeout=60
        )

    @property
    def settings(self) -> Settings:
        """Those that it runs with."""
        mine = {k: v for k, v in self.environment().items() if k.startswith(("ERRATA_", "REDIS_"))}
        return Settings(**{name.removeprefix("ERRATA_").lower(): v for name, v in mine.items()})

    def database(self) -> Database:
        """Its database, opened by this process."""
        return Database(self.settings.sql_url)

    def store(self) -> ArtifactStore:
        """Its artifacts, opened by this process."""
        return open_store(self.settings)

    def new_key(self, *arguments: str) -> str:
        """The key that ``errata keys create`` makes."""
        ended = self.command("keys", "create", *arguments)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip()

    # -- asking ---------------------------------------------------------------------------------

    def get(self, path: str) -> Any:
        response = self.client.get(path)
        response.raise_for_status()
        return response.json()

    def metric(self, name: str) -> float:
        """What a sample of /metrics says, with all labels together."""
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        return sum(one.value for family in families for one in family.samples if one.name == name)

    def complete(self, model: str, prompt: str, **parameters: Any) -> dict[str, Any]:
        body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 12, **parameters}
        response = self.client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def text(self, model: str, prompt: str, **parameters: Any) -> str:
        text: str = self.complete(model, prompt, **parameters)["choices"][0]["text"]
        return text.strip().rstrip(".")

    def endpoint(self, name: str, version: str) -> None:
        """A new endpoint at that version."""
        response = self.client.put(
            f"/v1/endpoints/{name}", json={"version": version}, headers={"If-None-Match": "*"}
        )
        assert response.status_code == 201, response.text

    def base_version(self) -> str:
        version: str = self.get("/v1/models/base_atlas")["version"]
        return version

    def post_edit(self, **body: Any) -> dict[str, Any]:
        response = self.client.post("/v1/edits", json=body)
        assert response.status_code == 202, response.text
        job: dict[str, Any] = response.json()
        return job

    def job(self, job_id: str) -> dict[str, Any]:
        job: dict[str, Any] = self.get(f"/v1/jobs/{job_id}")
        return job

    def ended(self, job_id: str) -> dict[str, Any]:
        """The job once it has ended."""

        def has_ended() -> bool:
            try:
                return self.job(job_id)["status"] in ("succeeded", "failed", "cancelled")
            except httpx.HTTPError:
                return False

        wait_for(has_ended, JOB_SECONDS, lambda: self.log()[-3000:])
        return self.job(job_id)

    def underway(self, job_id: str) -> None:
        """Wait until the job's method is at work."""

        def at_work() -> bool:
            job = self.job(job_id)
            assert job["status"] in ("queued", "running"), job
            return job["status"] == "running" and job["progress"]["done"] > 0

        wait_for(at_work, JOB_SECONDS, lambda: self.log()[-3000:])

    # -- processes ------------------------------------------------------------------------------

    def pid(self, name: str) -> int:
        """The pid of ``api``, ``engine``, ``queue``, ``worker`` or the busy ``horse``."""
        if self._process is None:
            raise AssertionError("the service is not running")
        if name == "api":
            return self._process.pid
        marks = {
            "engine": ("-m serving", "serving/__main__"),
            "queue": ("valkey-server", "redis-server"),
            "worker": ("app.cli worker",),
            "horse": ("workers.horse",),
        }[name]
        for pid in descendants(self._process.pid):
            line = command_line(pid)
            is_tether = "workers.tether" in line
            if not is_tether and any(mark in line for mark in marks):
                return pid
        raise AssertionError(f"no process of {name} runs")

    def kill(self, name: str) -> None:
        """kill -9."""
        os.kill(self.pid(name), signal.SIGKILL)

    def kill_api(self) -> list[int]:
        """kill -9 of the API; returns the pids that lived under it."""
        process = self._process
        if process is None:
            raise AssertionError("the service is not running")
        children = descendants(process.pid)
        process.kill()
        process.wait()
        self._process = None
        return children


def wait_for(
    condition: Callable[[], bool], seconds: float, explain: Callable[[], str] = str
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s\n{explain()}"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def descendants(pid: int) -> list[int]:
    """The processes below one, oldest first."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
