"""The values that travel between the engine and its clients, and their JSON.

A client sends ``{"op": "generate" | "cancel" | "warm" | "status", "id": n, …}``; ``context``, if it
is there, names the request in the engine's logs. Of a request for several samples the first has the
id n, the next n + 1 and so on, and each is answered and cancelled by its own. The engine answers
with a frame a step, or several where it would be too long, ``{"pieces": [{"id": n, …}, …]}``; an
entry that carries ``error`` ends its request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any, NamedTuple

from registry import errors
from registry.errors import ErrataError, InvalidRequest
from registry.manifests import VersionManifest

#: Most stop strings of a request, the characters of each, and the most stop tokens.
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000
MAX_STOP_TOKENS = 64
#: Most alternatives reported for a token.
MAX_LOGPROBS = 20
#: Most tokens with a bias, and how far one goes either way.
MAX_BIASES = 300
MAX_BIAS = 100.0
#: Most bytes of a grammar.
MAX_GRAMMAR_BYTES = 64 * 1024
#: Most completions of one HTTP request.
MAX_CHOICES = 128
#: Characters that a token of a usual text has.
CHARACTERS_PER_TOKEN = 4


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

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> VersionRef:
        return cls(**{**body, "stack": tuple(body["stack"])})


@dataclass(frozen=True)
class Grammar:
    """What a completion's text must match: a JSON schema, as JSON, or a regular expression.

    Raises:
        InvalidRequest: it is too long.
    """

    kind: str  # "json_schema" or "regex"
    text: str

    def __post_init__(self) -> None:
        if (size := len(self.text.encode(errors="replace"))) > MAX_GRAMMAR_BYTES:
            raise InvalidRequest(
                f"the {self.kind} has {size} bytes; the most is {MAX_GRAMMAR_BYTES}",
                param="response_format",
            )


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
        min_p: sample from tokens at least this likely relative to the most likely one.
        repetition_penalty: divides the positive logits of tokens in prompt and completion, and
            multiplies the negative ones (CTRL, Keskar et al. 2019).
        presence_penalty: taken off the logits of tokens in the completion, once.
        frequency_penalty: taken off as many times as the token is in the completion.
        logit_bias: (token id, what is added to its logit).
        stop_token_ids: tokens that end the completion as an end of sequence does.
        min_tokens: the completion does not end by a token before it has so many.
        grammar: what the text must match.

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
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 0:
            _refuse("max_tokens", self.max_tokens, "at least 0")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            _refuse("temperature", self.temperature, "a finite number, at least 0")
        if not 0 < self.top_p <= 1:
            _refuse("top_p", self.top_p, "above 0 and at most 1")
        if self.top_k < 0:
            _refuse("top_k", self.top_k, "at least 0")
        if not 0 <= self.min_p <= 1:
            _refuse("min_p", self.min_p, "from 0 to 1")
        if not 0.01 <= self.repetition_penalty <= 100:
            _refuse("repetition_penalty", self.repetition_penalty, "from 0.01 to 100")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                _refuse(name, getattr(self, name), "from -2 to 2")
        self._check_ends()
        if len(self.logit_bias) > MAX_BIASES:
            _refuse("logit_bias", f"of {len(self.logit_bias)} tokens", f"of at most {MAX_BIASES}")
        for token, bias in self.logit_bias:
            if token < 0 or not -MAX_BIAS <= bias <= MAX_BIAS:
                _refuse("logit_bias", {token: bias}, "token ids with numbers from -100 to 100")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            _refuse("seed", self.seed, "a 64-bit integer")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            _refuse("logprobs", self.logprobs, f"from 0 to {MAX_LOGPROBS}")

    def _check_ends(self) -> None:
        longest = max(map(len, self.stop), default=1)
        if len(self.stop) > MAX_STOPS or not all(self.stop) or longest > MAX_STOP_CHARACTERS:
            right = f"at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters"
            _refuse("stop", [stop[:50] for stop in self.stop], right)
        ids = self.stop_token_ids
        if len(ids) > MAX_STOP_TOKENS or any(token < 0 for token in ids):
            _refuse("stop_token_ids", ids[:9], f"at most {MAX_STOP_TOKENS} token ids")
        most = math.inf if self.max_tokens is None else self.max_tokens
        if not 0 <= self.min_tokens <= most:
            _refuse("min_tokens", self.min_tokens, "from 0 to max_tokens")
        if self.grammar is not None and (self.min_tokens or self.ignore_eos):
            raise InvalidRequest(
                "a grammar decides where the text may end: leave out min_tokens and ignore_eos",
                param="min_tokens" if self.min_tokens else "ignore_eos",
            )

    def sample(self, index: int) -> SamplingParams:
        """Those of one of several samples: with a seed each has another."""
        if self.seed is None:
            return self
        return replace(self, seed=(self.seed + index + 2**63) % 2**64 - 2**63)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "grammar": None if self.grammar is None else vars(self.grammar)}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> SamplingParams:
        grammar = body["grammar"]
        return cls(
            **{
                **body,
                "stop": tuple(body["stop"]),
                "logit_bias": tuple((token, bias) for token, bias in body["logit_bias"]),
                "stop_token_ids": tuple(body["stop_token_ids"]),
                "grammar": None if grammar is None else Grammar(**grammar),
            }
        )


def _refuse(param: str, value: object, right: str) -> None:
    raise InvalidRequest(f"{param} is {value!r}; it must be {right}", param=param)


@dataclass(frozen=True)
class Proxy:
    """Proxy decoding: logits + alpha (expert - anti-expert) (Liu et al. 2024, "Tuning language
    models by proxy"); both stand on the request's base."""

    expert: VersionRef
    anti_expert: VersionRef
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and abs(self.alpha) <= 100):
            _refuse("proxy.alpha", self.alpha, "from -100 to 100")

    def to_json(self) -> dict[str, Any]:
        expert, anti_expert = vars(self.expert), vars(self.anti_expert)
        return {"expert": expert, "anti_expert": anti_expert, "alpha": self.alpha}


@dataclass(frozen=True)
class GenerateRequest:
    """Completions, one or several, of exactly one of ``prompt``, ``prompt_tokens``, ``messages``.

    With ``echo`` the first piece begins with the prompt: its text and, where log-probabilities are
    asked for, its tokens' (the first has none). Only then may ``max_tokens`` be 0.
    """

    version: VersionRef
    params: SamplingParams = SamplingParams()
    prompt: str | None = None
    prompt_tokens: tuple[int, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    echo: bool = False
    proxy: Proxy | None = None
    tenant: str = ""  # who may share what is cached of the prompt
    samples: int = 1

    def __post_init__(self) -> None:
        given = (self.prompt, self.prompt_tokens, self.messages)
        if sum(value is not None for value in given) != 1:
            raise InvalidRequest(
                "give exactly one of prompt, prompt_tokens and messages", param="prompt"
            )
        if self.params.max_tokens == 0 and not self.echo:
            _refuse("max_tokens", 0, "at least 1 (0 only with echo)")

    @property
    def versions(self) -> tuple[VersionRef, ...]:
        """The voices computed in lock-step: the version's, then expert and anti-expert."""
        if self.proxy is None:
            return (self.version,)
        return (self.version, self.proxy.expert, self.proxy.anti_expert)

    @property
    def likely_prompt_tokens(self) -> int:
        """The prompt's length where the engine has not told it: of texts a guess."""
        if self.prompt_tokens is not None:
            return len(self.prompt_tokens)
        texts = [self.prompt or "", *(message["content"] for message in self.messages or ())]
        return math.ceil(sum(map(len, texts)) / CHARACTERS_PER_TOKEN)

    def sample(self, index: int) -> GenerateRequest:
        """The request for one of the samples."""
        return replace(self, params=self.params.sample(index), samples=1)

    def to_json(self) -> dict[str, Any]:
        """A view, not a copy: prompts may be long."""
        return {
            **vars(self),
            "version": vars(self.version),
            "params": self.params.to_json(),
            "proxy": None if self.proxy is None else self.proxy.to_json(),
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> GenerateRequest:
        tokens, messages, proxy = body["prompt_tokens"], body["messages"], body["proxy"]
        return cls(
            version=VersionRef.from_json(body["version"]),
            params=SamplingParams.from_json(body["params"]),
            prompt=body["prompt"],
            prompt_tokens=None if tokens is None else tuple(tokens),
            messages=None if messages is None else tuple(messages),
            echo=body["echo"],
            proxy=None
            if proxy is None
            else Proxy(
                VersionRef.from_json(proxy["expert"]),
                VersionRef.from_json(proxy["anti_expert"]),
                proxy["alpha"],
            ),
            tenant=body["tenant"],
            samples=body["samples"],
        )


@dataclass(frozen=True)
class TopLogprob:
    """A token that could have been chosen.

    ``text``: lone surrogates stand for bytes that are part of a character (``surrogateescape``).
    """

    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability (fp32, sent exactly) and the most likely tokens in its place.

    Both are of the model's own distribution, before any processing. A prompt's first token has
    none. ``offset``: the characters of the text before the token.
    """

    id: int
    text: str
    logprob: float | None
    top: tuple[TopLogprob, ...] = ()
    offset: int = 0


@dataclass(frozen=True)
class Usage:
    """``cached_tokens``: of the prompt, those whose keys and values the prefix cache had."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Timing(NamedTuple):
    """Where the seconds of a completion went: waiting for a place, the prompt up to the first
    token, the tokens after it."""

    queued: float
    prefill: float
    decode: float


class Piece(NamedTuple):
    """What one step added to a completion. The first piece says how many tokens the prompt has; the
    last has a reason, the usage and the timing.

    ``text`` may lag behind ``tokens``: half a character, or what may become a stop string, is held
    back until it is settled. An end-of-sequence token is not part of the completion.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: str | None = None  # "stop" or "length"
    usage: Usage | None = None
    timing: Timing | None = None
    prompt_tokens: int | None = None

    def to_json(self) -> dict[str, Any]:
        body: dict[str, Any] = {"text": self.text, "tokens": self.tokens}
        if self.logprobs is not None:
            body["logprobs"] = [
                [
                    entry.id,
                    entry.text,
                    entry.logprob,
                    [[t.id, t.text, t.logprob] for t in entry.top],
                    entry.offset,
                ]
                for entry in self.logprobs
            ]
        if self.finish_reason is not None:
            body["finish_reason"] = self.finish_reason
        if self.usage is not None:
            body["usage"] = astuple(self.usage)
        if self.timing is not None:
            body["timing"] = self.timing
        if self.prompt_tokens is not None:
            body["prompt_tokens"] = self.prompt_tokens
        return body

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Piece:
        logprobs, usage, timing = (body.get(name) for name in ("logprobs", "usage", "timing"))
        return cls(
            text=body["text"],
            tokens=tuple(body["tokens"]),
            logprobs=None
            if logprobs is None
            else tuple(
                TokenLogprob(id, text, logprob, tuple(TopLogprob(*entry) for entry in top), offset)
                for id, text, logprob, top, offset in logprobs
            ),
            finish_reason=body.get("finish_reason"),
            usage=None if usage is None else Usage(*usage),
            timing=None if timing is None else Timing(*timing),
            prompt_tokens=body.get("prompt_tokens"),
        )


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
