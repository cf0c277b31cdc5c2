"""The streams: each asks, waits for the answer, thinks, and asks again; every answer is judged."""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx

from benchmarks.load.client import Answer, send
from benchmarks.load.workload import Questions, Scale

#: Longest that an answer may take.
PATIENCE = 120.0
#: Of the complaints that are alike this many are kept whole.
MOST_TOLD = 20


@dataclass
class Traffic:
    """What the streams asked, and what came of it.

    Attributes:
        floors: the highest generation of each endpoint that anybody has been told of; no later
            request may be answered by an older one.
        named: of each endpoint the (generation, version) that answers named, and when the first
            of these ended, as ``time.time`` tells it.
        seconds: of each answer that was waited for.
        first: from asking to the first event; gaps: between events.
        wrong: complaints, counted by kind.
    """

    url: str
    scale: Scale
    questions: Questions
    floors: dict[str, int]
    named: dict[tuple[str, int, str], float] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    seconds: array[float] = field(default_factory=lambda: array("d"))
    first: array[float] = field(default_factory=lambda: array("d"))
    gaps: array[float] = field(default_factory=lambda: array("d"))
    tokens: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    told: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return self.kinds.total()

    async def run(self) -> None:
        """All streams, for the scale's time and to the end of their last answers."""
        stop = time.perf_counter() + self.scale.seconds
        await asyncio.gather(*(self._stream(number, stop) for number in range(self.scale.streams)))

    async def _stream(self, number: int, stop: float) -> None:
        chance = random.Random(number)
        address = urlsplit(self.url)
        host, port = address.hostname or "", address.port or 80
        await asyncio.sleep(chance.random() * self.scale.think)
        while time.perf_counter() < stop:
            ask = self.questions.draw(self.scale, chance)
            try:
                answer = await send(host, port, ask, self.floors[ask.model], PATIENCE)
            except OSError as error:
                self._complain("no connection", str(error))
                continue
            self._judge(answer)
            await asyncio.sleep(chance.expovariate(1 / self.scale.think))

    def _judge(self, answer: Answer) -> None:
        ask = answer.ask
        self.kinds["hung up" if answer.hung_up else "streamed" if ask.stream else "whole"] += 1
        if answer.status != 200:
            self._complain(f"status {answer.status}", ask.model)
            return
        if not answer.version or answer.mixed:
            self._complain("version", f"{ask.model}: {answer.version!r}, mixed: {answer.mixed}")
        if answer.generation < answer.floor:
            self._complain("stale", f"{ask.model}: {answer.generation} after {answer.floor}")
        if not answer.hung_up and not (answer.whole and answer.tokens == ask.max_tokens):
            self._complain("not whole", f"{ask.model}: {answer.tokens} of {ask.max_tokens} tokens")
        self.floors[ask.model] = max(self.floors[ask.model], answer.generation)
        key = (ask.model, answer.generation, answer.version)
        self.named.setdefault(key, answer.ended_at)
        self.tokens += answer.tokens
        if not answer.hung_up:
            self.seconds.append(answer.seconds)
        if answer.times:
            self.first.append(answer.times[0] - answer.begun)
            self.gaps.extend(answer.gaps)

    def _complain(self, kind: str, what: str) -> None:
        self.wrong[kind] += 1
        if len(self.told) < MOST_TOLD:
            self.told.append(f"{kind}: {what}")

    async def check_names(self, client: httpx.AsyncClient) -> None:
        """Every generation that an answer named is in its endpoint's history, was made before the
        answer ended, and has the version in its state."""
        histories = {}
        for name in self.scale.endpoints:
            try:
                histories[name] = await _history(client, name)
            except httpx.HTTPError as error:
                self._complain("history", f"{name} tells none: {error!r}")
        for (name, generation, version), ended in self.named.items():
            if name not in histories:
                continue
            made, named = histories[name].get(generation, (0.0, frozenset()))
            if version not in named or made > ended + 1:  # moves' times are whole seconds
                self._complain("version", f"{name} never named {version} at {generation}")


async def _history(
    client: httpx.AsyncClient, name: str
) -> Mapping[int, tuple[float, frozenset[str]]]:
    """When each generation was made, and the versions of its state."""
    found: dict[int, tuple[float, frozenset[str]]] = {}
    query: dict[str, int] = {"limit": 100}
    while True:
        answer = await client.get(f"/v1/endpoints/{name}/history", params=query)
        page = answer.raise_for_status().json()
        for move in page["data"]:
            versions = frozenset(target["version"] for target in move["after"] or ())
            found[move["generation"]] = (move["created_at"], versions)
        if not page["has_more"]:
            return found
        query["after"] = page["data"][-1]["generation"]
