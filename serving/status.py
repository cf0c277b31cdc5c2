"""What the engine says of itself, as values and as JSON. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from serving.counters import Histogram


@dataclass(frozen=True)
class BaseStatus:
    """A loaded base, and its counters since the engine started.

    Attributes:
        min_rows: so many rows make a product's bits independent of the batch.
        kv_block: tokens of a block of keys and values.
        cached_tokens: of the prompts' tokens, those that the prefix cache had.
        step_tokens: tokens of each step; ``step_seconds``: what it took.
    """

    name: str
    digest: str
    family: str
    dtype: str
    context_length: int
    vocab_size: int
    has_chat_template: bool
    batch_invariant: bool
    min_rows: int
    running: int
    waiting: int
    kv_tokens: int
    kv_used: int
    kv_cached: int
    kv_block: int
    preempted: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    step_tokens: Histogram
    step_seconds: Histogram

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> BaseStatus:
        names = ("step_tokens", "step_seconds")
        return cls(**{**body, **{name: Histogram.from_json(body[name]) for name in names}})


@dataclass(frozen=True)
class ResidentVersion:
    """A version whose composed effects are in memory."""

    stack_digest: str
    base: str
    depth: int
    nbytes: int
    requests: int


@dataclass(frozen=True)
class EngineStatus:
    """What the engine holds, and its counters since it started.

    Attributes:
        loads: seconds that versions took on their way in; ``failed_loads`` did not get there.
    """

    pid: int
    threads: int
    bases: tuple[BaseStatus, ...]
    versions: tuple[ResidentVersion, ...]
    steps: int
    prompt_tokens: int
    completion_tokens: int
    loads: Histogram
    failed_loads: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> EngineStatus:
        plain = {f.name: body[f.name] for f in fields(cls)}
        plain["bases"] = tuple(map(BaseStatus.from_json, body["bases"]))
        plain["loads"] = Histogram.from_json(body["loads"])
        plain["versions"] = tuple(ResidentVersion(**version) for version in body["versions"])
        return cls(**plain)
