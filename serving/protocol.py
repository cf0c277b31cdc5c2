"""The frozen dataclasses that travel between the engine and its clients, and their JSON.

A client sends ``{"op": "generate" | "cancel" | "status", "id": n, …}``. The engine answers with one
frame a step, ``{"pieces": [{"id": n, …}, …]}``; an entry that carries ``error`` ends its request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from registry import errors
from registry.errors import ErrataError, InvalidRequest
from registry.manifests import VersionManifest

#: Most stop strings of a request, and the most alternatives reported for a token.
MAX_STOPS = 16
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class VersionRef:
    """The version a request is answered by, resolved at admission."""

    id: str
    base: str
    stack: tuple[str, ...]
    stack_digest: str

    @classmethod
    def of(cls, manifest: VersionManifest) -> VersionRef:
        return cls(manifest.id, manifest.base.name, manifest.stack, manifest.stack_digest)


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a completion ends.

    Attributes:
        max_tokens: most new tokens; None: as many as the context and the cache hold.
        temperature: 0 takes the most likely token.
        top_p: sample from the smallest set of tokens with this probability.
        top_k: sample from this many most likely tokens; 0: from all.
        stop: the text ends before the first of these.
        seed: makes sampling reproducible, whatever else is in the batch.
        logprobs: report each token's log-probability and this many alternatives'.
        ignore_eos: go on past an end-of-sequence token.

    Raises:
        InvalidRequest: a value is out of its range; ``param`` names it.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            _refuse("max_tokens", self.max_tokens, "at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            _refuse("temperature", self.temperature, "a finite number, at least 0")
        if not 0 < self.top_p <= 1:
            _refuse("top_p", self.top_p, "above 0 and at most 1")
        if self.top_k < 0:
            _refuse("top_k", self.top_k, "at least 0")
        if len(self.stop) > MAX_STOPS or not all(self.stop):
            _refuse("stop", list(self.stop), f"at most {MAX_STOPS} strings that are not empty")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            _refuse("seed", self.seed, "a 64-bit integer")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            _refuse("logprobs", self.logprobs, f"from 0 to {MAX_LOGPROBS}")


def _refuse(param: str, value: object, right: str) -> None:
    raise InvalidRequest(f"{param} is {value!r}; it must be {right}", param=param)


@dataclass(frozen=True)
class GenerateRequest:
    """One completion of exactly one of ``prompt``, ``prompt_tokens`` and ``messages``."""

    version: VersionRef
    params: SamplingParams = SamplingParams()
    prompt: str | None = None
    prompt_tokens: tuple[int, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None

    def __post_init__(self) -> None:
        given = (self.prompt, self.prompt_tokens, self.messages)
        if sum(value is not None for value in given) != 1:
            raise InvalidRequest(
                "give exactly one of prompt, prompt_tokens and messages", param="prompt"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> GenerateRequest:
        version, params = body["version"], body["params"]
        tokens, messages = body["prompt_tokens"], body["messages"]
        return cls(
            version=VersionRef(**{**version, "stack": tuple(version["stack"])}),
            params=SamplingParams(**{**params, "stop": tuple(params["stop"])}),
            prompt=body["prompt"],
            prompt_tokens=None if tokens is None else tuple(tokens),
            messages=None if messages is None else tuple(messages),
        )


@dataclass(frozen=True)
class TopLogprob:
    """A token that could have been chosen."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token's log-probability (fp32, sent exactly) and its most likely alternatives.

    Both are of the model's own distribution, before temperature, top_p and top_k.
    """

    id: int
    text: str
    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Piece:
    """What one step added to a completion. The last piece has a reason and the usage.

    ``text`` may lag behind ``tokens``: half a character, or what may become a stop string, is held
    back until it is settled. An end-of-sequence token is not part of the completion.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: str | None = None  # "stop" or "length"
    usage: Usage | None = None

    def to_json(self) -> dict[str, Any]:
        body: dict[str, Any] = {"text": self.text, "tokens": self.tokens}
        if self.logprobs is not None:
            body["logprobs"] = [
                [
                    entry.id,
                    entry.text,
                    entry.logprob,
                    [[t.id, t.text, t.logprob] for t in entry.top],
                ]
                for entry in self.logprobs
            ]
        if self.finish_reason is not None:
            body["finish_reason"] = self.finish_reason
        if self.usage is not None:
            body["usage"] = [self.usage.prompt_tokens, self.usage.completion_tokens]
        return body

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Piece:
        logprobs, usage = body.get("logprobs"), body.get("usage")
        return cls(
            text=body["text"],
            tokens=tuple(body["tokens"]),
            logprobs=None
            if logprobs is None
            else tuple(
                TokenLogprob(id, text, logprob, tuple(TopLogprob(*entry) for entry in top))
                for id, text, logprob, top in logprobs
            ),
            finish_reason=body.get("finish_reason"),
            usage=None if usage is None else Usage(*usage),
        )


@dataclass(frozen=True)
class BaseStatus:
    """A loaded base. ``min_rows`` rows make a product's bits independent of the batch."""

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
    """What the engine holds, and its counters since it started."""

    pid: int
    threads: int
    bases: tuple[BaseStatus, ...]
    versions: tuple[ResidentVersion, ...]
    steps: int
    prompt_tokens: int
    completion_tokens: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> EngineStatus:
        plain = {f.name: body[f.name] for f in fields(cls)}
        plain["bases"] = tuple(BaseStatus(**base) for base in body["bases"])
        plain["versions"] = tuple(ResidentVersion(**version) for version in body["versions"])
        return cls(**plain)


def error_to_json(error: ErrataError) -> dict[str, Any]:
    return {
        "class": type(error).__name__,
        "message": error.message,
        "param": error.param,
        "code": error.code,
        "retry_after": error.retry_after,
    }


def error_from_json(body: Mapping[str, Any]) -> ErrataError:
    """The error as it was raised: its class, message, param and code."""
    found = getattr(errors, body["class"], None)
    kind = found if isinstance(found, type) and issubclass(found, ErrataError) else ErrataError
    return kind(
        body["message"], param=body["param"], code=body["code"], retry_after=body["retry_after"]
    )
