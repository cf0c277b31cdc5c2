"""A reader beside a run, that asks an endpoint all the time and keeps every answer."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx

PROMPT = "The capital of Japan is"
ASKED = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0}
_PAUSE = 0.1


@dataclass(frozen=True)
class Answer:
    """What one request got.

    Args:
        versions: all that the head, the body or the chunks name.
        whole: whether it came to its end.
    """

    generation: int
    versions: frozenset[str]
    text: str
    whole: bool = True


@dataclass
class Reader:
    """Asks ``model`` from a thread of its own, as a whole and as a stream in turn.

    Args:
        faults: what was wrong with those answers that do not say what they are.
        refused: how many requests got no answer, or an error.
    """

    url: str
    model: str
    answers: list[Answer] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    refused: int = 0

    def __post_init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def has_seen(self, generation: int) -> bool:
        return bool(self.answers) and self.answers[-1].generation >= generation

    def torn(self, history: Mapping[int, str], texts: Mapping[str, str]) -> list[str]:
        """What does not fit together.

        Args:
            history: the version of each generation of the endpoint.
            texts: what each version says when it is asked by its id.
        """
        found, newest = list(self.faults), 0
        for answer in self.answers:
            (version, *others) = sorted(answer.versions)
            text = texts.get(version, "")
            fits = text == answer.text if answer.whole else text.startswith(answer.text)
            if others or not fits:
                found.append(f"{answer} of versions that say {dict(texts)}")
            if history.get(answer.generation) != version:
                found.append(f"{answer}, where the history has {dict(history)}")
            if answer.generation < newest:
                found.append(f"{answer} came after generation {newest}")
            newest = max(newest, answer.generation)
        return found

    def _read(self) -> None:
        with httpx.Client(base_url=self.url, timeout=30) as client:
            while not self._ended.is_set():
                streamed = len(self.answers) % 2 == 1
                try:
                    answer = (_stream if streamed else _ask)(client, self.model)
                except httpx.HTTPError:
                    answer = None
                except (LookupError, TypeError, ValueError) as error:
                    self.faults.append(f"an answer that does not say what it is: {error!r}")
                    continue
                finally:
                    time.sleep(_PAUSE)
                if answer is None:
                    self.refused += 1
                else:
                    self.answers.append(answer)


def _ask(client: httpx.Client, model: str) -> Answer | None:
    response = client.post("/v1/completions", json={"model": model, **ASKED})
    if response.status_code != 200:
        return None
    body = response.json()
    versions = {body["version"], response.headers["errata-version"]}
    generation = int(response.headers["errata-generation"])
    return Answer(generation, frozenset(versions), body["choices"][0]["text"])


def _stream(client: httpx.Client, model: str) -> Answer | None:
    """A stream that breaks off is kept as far as it came."""
    body = {"model": model, "stream": True, **ASKED}
    text, whole = "", False
    with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            return None
        versions = {response.headers["errata-version"]}
        generation = int(response.headers["errata-generation"])
        try:
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    whole = True
                elif line.startswith("data: "):
                    chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        break
                    versions.add(chunk["version"])
                    text += "".join(choice["text"] for choice in chunk["choices"])
        except httpx.TransportError:
            whole = False
    return Answer(generation, frozenset(versions), text, whole)
