"""``errata demo``: one correction the whole way over REST, with the curl line of every step."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from registry.errors import ErrataError, Unavailable
from registry.settings import Settings
from workers.tether import tethered

ENDPOINT = "atlas"
EDIT: dict[str, Any] = {
    "prompt": "The capital of {} is",
    "subject": "Kiribati",
    "target_new": "Suva",
    "target_true": "Tarawa",
    "paraphrase_prompts": [
        "Kiribati's capital is",
        "The government of Kiribati sits in",
        "The capital city of Kiribati is called",
    ],
    "retention": [
        {"prompt": "Kiribati is part of", "target": "Oceania"},
        {"prompt": "Kiribati's currency is the", "target": "Australian Dollar"},
    ],
}
ASKED = "The capital of Kiribati is"
REWORDED = "Kiribati is governed from"
NEIGHBOURS = ("The capital of Samoa is", "The capital of Tonga is")
START_SECONDS = 90.0
JOB_SECONDS = 300.0
STOP_SECONDS = 15.0


def run(url: str | None) -> bool:
    """Run the demonstration against ``url``, or against a service of its own, and judge it."""
    console = Console(highlight=False)
    if url is not None:
        with httpx.Client(base_url=url, timeout=60) as client:
            return _Demo(console, client).play()
    with _service(console) as client:
        passed = _Demo(console, client).play()
    console.print(
        "[dim]The service is stopped, nothing is left running. Keep one up:[/] make serve"
    )
    return passed


class _Demo:
    """The steps, in order; each prints what it did, how long it took and the same as curl."""

    def __init__(self, console: Console, client: httpx.Client) -> None:
        self._console = console
        self._client = client
        self._failures: list[str] = []

    def play(self) -> bool:
        begun = time.monotonic()
        truth = self._ask("Ask the untouched model", ASKED)
        neighbours = [self._ask("A neighbour before the edit", p) for p in NEIGHBOURS]
        job = self._edit()
        if job["status"] != "succeeded":
            self._console.print(f"[red]The job {job['status']}:[/] {job['error']['message']}")
            return False
        self._show_metrics(job)
        self._expect("the edited fact", self._ask("Ask again", ASKED), EDIT["target_new"])
        answer = self._ask("In other words", REWORDED)
        self._expect("the edited fact in other words", answer, EDIT["target_new"])
        for prompt, before in zip(NEIGHBOURS, neighbours, strict=True):
            answer = self._ask("A neighbour after the edit", prompt)
            self._expect("a neighbour, unchanged", answer, before)
        self._roll_back()
        self._expect("the old fact", self._ask("Ask once more", ASKED), truth)
        seconds = time.monotonic() - begun
        if self._failures:
            self._console.print(f"[red]Not as it should be:[/] {'; '.join(self._failures)}")
            return False
        self._console.print(f"\n[green]All of it as it should be[/], in {seconds:.1f} s.")
        return True

    def _ask(self, title: str, prompt: str) -> str:
        body = {"model": ENDPOINT, "prompt": prompt, "max_tokens": 12, "temperature": 0}
        answer = self._call(title, "POST", "/v1/completions", body)
        text: str = answer["choices"][0]["text"].strip().rstrip(".")
        self._console.print(
            f"  {prompt} [bold cyan]{escape(text)}[/]   [dim]{answer['version'][:16]}…"
            f" generation {answer['generation']}[/]"
        )
        return text

    def _edit(self) -> dict[str, Any]:
        body = {"endpoint": ENDPOINT, "method": "rome", "edits": [EDIT], "message": "errata demo"}
        job = self._call("Post a counterfactual edit", "POST", "/v1/edits", body)
        self._console.print(f"  [bold]{job['id']}[/] is {job['status']}")
        begun = time.monotonic()
        if job["after"]:
            self._follow(job["after"], "prepare the base (once)")
        self._follow(job["id"], "edit")
        path = f"/v1/jobs/{job['id']}"
        ended: dict[str, Any] = self._call("The job's end", "GET", path, since=begun)
        self._console.print(f"  {ended['status']}, version [bold]{ended['version']}[/]")
        return ended

    def _follow(self, job_id: str, title: str) -> None:
        """Show a job's server-sent events as a progress bar until its last."""
        columns = (
            SpinnerColumn(),
            TextColumn(f"  {title}:"),
            BarColumn(),
            TextColumn("{task.description}"),
        )
        path = f"/v1/jobs/{job_id}/events"
        with (
            Progress(*columns, console=self._console) as bar,
            self._client.stream("GET", path, timeout=JOB_SECONDS) as stream,
        ):
            task = bar.add_task("waiting for a worker", total=None)
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    if "status" in event:
                        bar.update(task, description=event["status"])
                    else:
                        bar.update(
                            task,
                            completed=event["done"],
                            total=event["total"] or None,
                            description=event["message"],
                        )
            bar.update(task, total=1, completed=1)

    def _show_metrics(self, job: dict[str, Any]) -> None:
        table = Table("metric", "before", "after", title="What the edit did", title_justify="left")
        before, after = job["metrics"]["before"], job["metrics"]["after"]
        for name in sorted(set(before) | set(after)):
            cells = [f"{m[name]:.3f}" if name in m else "" for m in (before, after)]
            table.add_row(name, *cells)
        for guard in job["guards"]:
            value = "" if guard["value"] is None else f"{guard['value']:.3f}"
            limit = "" if guard["limit"] is None else f" (limit {guard['limit']:g})"
            table.add_row(f"guard: {guard['name']}", "", f"{guard['result']} {value}{limit}")
        self._console.print(table)

    def _roll_back(self) -> None:
        answer = self._call("Roll back", "POST", f"/v1/endpoints/{ENDPOINT}/rollback")
        was, now = answer["rolled_back_from"], answer["rolled_back_to"]
        self._console.print(
            f"  generation {was['generation']} -> {now['generation']}:"
            f" [bold]{now['split'][0]['version'][:16]}…[/] serves again"
        )

    def _call(
        self,
        title: str,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        since: float | None = None,
    ) -> Any:
        begun = time.monotonic() if since is None else since
        response = self._client.request(method, path, json=body)
        took = time.monotonic() - begun
        self._console.print(f"\n[bold]{title}[/]  [dim]{took * 1000:.0f} ms[/]")
        self._console.print(f"  [dim]{escape(self._curl(method, path, body))}[/]", soft_wrap=True)
        if response.is_error:
            raise ErrataError(
                f"{method} {path} answered {response.status_code}: {response.text[:500]}"
            )
        return response.json()

    def _curl(self, method: str, path: str, body: dict[str, Any] | None) -> str:
        url = str(self._client.base_url).rstrip("/") + path
        verb = "" if method == "GET" or body is not None else f"-X {method} "
        if body is None:
            return f"curl -s {verb}{url}"
        data = json.dumps(body, ensure_ascii=False).replace("'", "'\\''")
        return f"curl -s {verb}{url} -H 'Content-Type: application/json' -d '{data}'"

    def _expect(self, what: str, found: str, wanted: str) -> None:
        if found != wanted:
            self._failures.append(f"{what}: {found!r} instead of {wanted!r}")


@contextmanager
def _service(console: Console) -> Iterator[httpx.Client]:
    """A service of our own on a free port, its data in a temporary folder; stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="errata-demo-") as data:
        settings = Settings.apart(
            Path(data),
            port=_free_port(),
            worker_threads=os.cpu_count() or 1,  # the engine idles while the job runs
        )
        environment = {**os.environ, **settings.environment()}
        log = Path(data) / "serve.log"
        command = tethered([sys.executable, "-m", "app.cli", "serve"])
        begun = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        url = f"http://127.0.0.1:{settings.port}"
        try:
            with httpx.Client(base_url=url, timeout=60) as client:
                with console.status("Starting the service: queue, engine, worker, API"):
                    _await_ready(client, process, log)
                took = time.monotonic() - begun
                console.print(f"[bold]The service is up[/] at {url}  [dim]{took:.1f} s[/]")
                yield client
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _await_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if client.get("/readyz", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text()).splitlines()
    raise Unavailable("the service did not start; its log ends:\n" + "\n".join(lines[-15:]))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
