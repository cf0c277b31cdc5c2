"""What changes under load: moves keep out of jobs' way, and a fault of the service is counted."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from benchmarks.load import changes
from benchmarks.load.changes import Changes
from benchmarks.load.traffic import Traffic
from benchmarks.load.workload import QUICK, Questions
from tests.service import free_port

SCALE = replace(QUICK, edited=1, split=0, move_pause=0.0, edit_pause=0.0)
QUESTIONS = Questions([{"subject": "France"}])
JOB = {"id": "job_1", "status": "running"}
ENDED = {**JOB, "status": "succeeded", "activated": True, "version": "ver_2"}
#: A status to answer with, or to hang up without an answer.
Fault = int | None


@contextmanager
def faulty(faults: Sequence[Fault], asked: list[str]) -> Iterator[str]:
    """The URL of a server that speaks HTTP and fails so often when its job is asked for."""
    left = iter(faults)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path}")
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path == "/v1/edits":
                self._answer(202, JOB)
            elif not self.path.startswith("/v1/jobs/"):
                self._answer(200, {"generation": 2})
            elif (fault := next(left, 200)) == 200:
                self._answer(200, ENDED)
            elif fault is not None:
                self._answer(fault, {"error": {"message": "away"}})

        def do_POST(self) -> None:
            self.do_GET()

        def do_PUT(self) -> None:
            self.do_GET()

        def _answer(self, status: int, body: dict[str, Any]) -> None:
            self.send_response(status)
            self.send_header("ETag", '"1"')
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def changing(client: httpx.AsyncClient) -> Changes:
    return Changes(client, SCALE, QUESTIONS, ["ver_1"], dict.fromkeys(SCALE.endpoints, 1))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "POLL_SECONDS", 0.0)


def run(
    faults: Sequence[Fault], act: Callable[[Changes], Awaitable[None]]
) -> tuple[Changes, list[str]]:
    asked: list[str] = []

    async def acted(url: str) -> Changes:
        async with httpx.AsyncClient(base_url=url) as client:
            made = changing(client)
            await act(made)
            return made

    with faulty(faults, asked) as url:
        return asyncio.run(acted(url)), asked


def test_a_move_that_has_begun_ends_before_a_job_is_asked_for() -> None:
    async def both(made: Changes) -> None:
        moving = asyncio.create_task(made.keep_moving())
        await asyncio.sleep(0)  # it has drawn its endpoint
        made.stopping.set()
        await made.edit()
        await moving

    made, asked = run((), both)
    assert [path.split("/")[2] for path in asked[:3]] == ["endpoints", "endpoints", "edits"]
    assert made.moves.total() == len(made.edits) == 1


@pytest.mark.parametrize("fault", [503, 500, None])
def test_a_poll_without_an_answer_is_an_error_and_the_job_is_waited_for(fault: Fault) -> None:
    made, _ = run((fault,), Changes.edit)
    assert len(made.errors) == 1
    assert made.versions == ["ver_1", "ver_2"]


def test_nobody_waits_for_a_service_that_is_gone_when_the_run_is_over() -> None:
    async def over(made: Changes) -> None:
        made.stopping.set()
        await made.edit()

    made, _ = run([None] * 5, over)
    assert len(made.errors) == 1
    assert not made.edits


def test_a_move_without_an_answer_is_an_error() -> None:
    url = f"http://127.0.0.1:{free_port()}"  # where nobody listens

    async def moved() -> list[str]:
        async with httpx.AsyncClient(base_url=url) as client:
            made = changing(client)
            await made.move(random.Random(1))
            traffic = Traffic(url, SCALE, QUESTIONS, made.floors)
            await traffic.check_names(client)
            assert traffic.wrong == {"history": 1}
            return made.errors

    assert len(asyncio.run(moved())) == 1
