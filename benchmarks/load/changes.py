"""What changes while the streams run: edits' jobs, moves, splits, promotions, rollbacks."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx

from benchmarks.load.workload import LENIENT, Questions, Scale

POLL_SECONDS = 0.5
ENDED = ("succeeded", "failed", "cancelled")
#: How a move is answered: done, or refused since another one came before it.
MOVED = (200, 409, 412)


@dataclass
class Changes:
    """Edits and moves on a running service, and what they came to.

    Attributes:
        versions: that endpoints are moved between.
        floors: the highest generation of each endpoint that anybody has been told of.
        moves: how many of each kind were made.
        refused: moves that somebody else's came before, or that had nothing to go back to.
        edits: seconds of each job, and whether its version was activated.
        errors: what went wrong.
        stopping: ends both.
    """

    client: httpx.AsyncClient
    scale: Scale
    questions: Questions
    versions: list[str]
    floors: dict[str, int] = field(default_factory=dict)
    moves: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    edits: list[tuple[float, bool]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _numbers: Iterator[int] = field(default_factory=count)
    _edited: str = ""  # the endpoint that a job is under way for; it is not moved meanwhile
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # a move ends before a job begins

    async def create_endpoints(self) -> None:
        for name in self.scale.endpoints:
            made = await self.client.put(
                f"/v1/endpoints/{name}",
                json={"version": self.versions[0]},
                headers={"If-None-Match": "*"},
            )
            made.raise_for_status()
            self.floors[name] = made.json()["generation"]

    async def keep_editing(self) -> None:
        """One job after another, until ``stopping`` is set and the last one has ended."""
        while not self.stopping.is_set():
            await self.edit()
            self._edited = ""
            await self._pause(self.scale.edit_pause)

    async def edit(self) -> None:
        """One edit of an endpoint, to its job's end."""
        number = next(self._numbers)
        async with self._turn:
            self._edited = self.scale.endpoints[number % self.scale.edited]
            body = {
                "endpoint": self._edited,
                "method": "rome",
                "edits": [self.questions.cases[number % len(self.questions.cases)]],
                "hyperparameters": {"steps": self.scale.edit_steps},
                "guards": LENIENT,
            }
            begun = time.perf_counter()
            posted = await self._ask("POST", "/v1/edits", 202, json=body)
        if posted is None:
            return
        job: dict[str, Any] = posted.json()
        while job["status"] not in ENDED:
            await asyncio.sleep(POLL_SECONDS)
            polled = await self._ask("GET", f"/v1/jobs/{job['id']}", 200)
            if polled is not None:
                job = polled.json()
            elif self.stopping.is_set():
                return
        if job["status"] != "succeeded":
            self.errors.append(f"job {job['id']} {job['status']}: {job['error']}")
            return
        self.edits.append((time.perf_counter() - begun, job["activated"]))
        self.versions.append(job["version"])

    async def keep_moving(self) -> None:
        """One move after another, of an endpoint drawn by lot, until ``stopping`` is set."""
        chance = random.Random(7)
        while not self.stopping.is_set():
            async with self._turn:
                await self.move(chance)
            await self._pause(self.scale.move_pause)

    async def move(self, chance: random.Random) -> None:
        """One endpoint to another version, or between two, or back.

        An edited one is never split, since jobs need a head, nor moved while a job is under way
        for it, since the job's version would then not be activated.
        """
        name = chance.choice([name for name in self.scale.endpoints if name != self._edited])
        is_edited = name in self.scale.endpoints[: self.scale.edited]
        path = f"/v1/endpoints/{name}"
        now = await self._ask("GET", path, 200)
        if now is None:
            return
        headers = {"If-Match": now.headers["ETag"]}
        kind = chance.choice(("set", "rollback") if is_edited else ("set", "split", "rollback"))
        if len(now.json().get("split") or ()) > 1 and chance.random() < 0.5:
            kind = "promote"
        if kind == "rollback":
            moved = await self._ask("POST", f"{path}/rollback", *MOVED, headers=headers)
        elif kind == "promote":
            moved = await self._ask("POST", f"{path}/promote", *MOVED, headers=headers)
        else:
            recent = self.versions[-8:]
            chosen = chance.sample(recent, min(len(recent), 2 if kind == "split" else 1))
            split = [{"version": version, "weight": 1 + 8 * i} for i, version in enumerate(chosen)]
            body = {"split": split} if len(chosen) > 1 else {"version": chosen[0]}
            moved = await self._ask("PUT", path, *MOVED, json=body, headers=headers)
        if moved is None:
            return
        if moved.status_code != 200:
            self.refused[kind] += 1
        else:
            self.moves[kind] += 1
            self.floors[name] = max(self.floors[name], moved.json()["generation"])

    async def _ask(
        self, method: str, path: str, *statuses: int, **sent: Any
    ) -> httpx.Response | None:
        """The answer; None where there was none, or one of another status: that is an error."""
        try:
            answer = await self.client.request(method, path, **sent)
        except httpx.HTTPError as error:
            self.errors.append(f"{method} {path} was not answered: {error!r}")
            return None
        if answer.status_code in statuses:
            return answer
        told = f"{answer.status_code}: {answer.text[:300]}"
        self.errors.append(f"{method} {path} was answered {told}")
        return None

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.stopping.wait()
