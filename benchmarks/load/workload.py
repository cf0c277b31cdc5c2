"""Who asks what, how often, and what changes meanwhile."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from editing.atlas.evaluation import CASES_FILE

#: For edits that need not be good.
LENIENT = {"perplexity": 1e6, "retention": 0, "locality": 0, "norm": 1e6, "efficacy": 0}


@dataclass(frozen=True)
class Scale:
    """The sizes of a run; times in seconds.

    Attributes:
        think: mean of a stream's pause between two requests (exponential).
        move_pause, edit_pause: between two moves of endpoints; between two edits' jobs.
        sample_pause: between two looks at the service's memory.
        edited, split: endpoints that jobs edit; endpoints that are split between versions.
        kv_bytes: of the engine: few, so that its blocks are all in use after a minute.
    """

    seconds: float = 600.0
    streams: int = 64
    think: float = 2.0
    move_pause: float = 1.0
    edit_pause: float = 10.0
    edit_steps: int = 10
    sample_pause: float = 5.0
    edited: int = 2
    split: int = 2
    shortest: int = 8
    longest: int = 64
    kv_bytes: int = 2**26

    @property
    def endpoints(self) -> list[str]:
        """The first ones are edited, the others split; the earlier, the more often asked."""
        return [f"load-{number}" for number in range(self.edited + self.split)]

    def within(self, seconds: float, streams: int) -> Scale:
        return replace(self, seconds=seconds, streams=streams)


FULL = Scale()
QUICK = Scale(
    seconds=12.0,
    streams=6,
    think=0.2,
    move_pause=0.3,
    edit_pause=1.0,
    edit_steps=2,
    sample_pause=0.5,
    longest=24,
)


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        hang_up: after so many events the client closes the connection; None: it waits for the end.
    """

    model: str
    prompt: str
    max_tokens: int
    user: str
    stream: bool
    hang_up: int | None = None

    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "user": self.user,
        }
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body


@dataclass(frozen=True)
class Questions:
    """Atlas's cases: their prompts are asked, few of them often; their edits are posted in turn."""

    cases: Sequence[dict[str, Any]] = field(
        default_factory=lambda: json.loads(CASES_FILE.read_text())
    )

    @cached_property
    def prompts(self) -> list[str]:
        """Each once, in an order fixed for good."""
        found: dict[str, None] = {}
        for case in self.cases:
            for prompt in (*case["paraphrase_prompts"], *case.get("neighborhood_prompts", ())):
                found[prompt] = None
        prompts = list(found)
        random.Random(1).shuffle(prompts)
        return prompts

    def draw(self, scale: Scale, chance: random.Random) -> Ask:
        """The k-th endpoint and the k-th prompt with a chance as 1/k; a fifth of the requests is
        not streamed, a tenth hangs up in the middle; long answers are rarer than short ones."""
        names = scale.endpoints
        (model,) = chance.choices(names, [1 / (k + 1) for k in range(len(names))])
        prompts = self.prompts
        prompt = prompts[int(len(prompts) ** chance.random()) - 1]
        span = scale.longest / scale.shortest
        tokens = round(scale.shortest * span ** chance.random())
        kind = chance.random()
        hang_up = max(1, tokens // 2) if kind < 0.1 else None
        user = f"user-{chance.randrange(1000)}"
        return Ask(model, prompt, tokens, user, stream=kind < 0.8, hang_up=hang_up)
