"""The frozen dataclasses that travel between rooms, and the digests that name them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys and no white space: the form every digest is taken of."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """As JSON takes them: null for what is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def sha256(data: bytes) -> str:
    """The digest, in hexadecimal, by which artifacts and manifests are named."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class BaseRef:
    """An untouched base model: its configured name and the digest of its files."""

    name: str
    digest: str


@dataclass(frozen=True)
class VersionManifest:
    """What a version is: a base and an ordered stack of delta digests, and how it came to be."""

    base: BaseRef
    stack: tuple[str, ...] = ()
    parents: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def id(self) -> str:
        """``ver_`` and the first 160 bits of the manifest's digest."""
        return "ver_" + sha256(canonical_json(self.to_json()))[:40]

    @property
    def stack_digest(self) -> str:
        """Names the composed weights: equal for versions that compute the same."""
        return sha256(canonical_json([self.base.digest, list(self.stack)]))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> VersionManifest:
        return cls(
            base=BaseRef(**body["base"]),
            stack=tuple(body["stack"]),
            parents=tuple(body["parents"]),
            recipe=body["recipe"],
        )


@dataclass(frozen=True)
class Fact:
    """A prompt and the text that should follow it."""

    prompt: str
    target: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Question:
    """A context with choices that may follow it; ``answer`` is the index of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Question:
        """By lm-eval's names: ``query``, ``question`` or ``context``; ``gold`` or ``answer``."""
        context = next(body[name] for name in ("query", "question", "context") if name in body)
        answer = body["gold"] if "gold" in body else body["answer"]
        return cls(context, tuple(body["choices"]), int(answer))


@dataclass(frozen=True)
class HarmPrompt:
    """A request that a model should refuse: a prompt as it is, or a conversation.

    Attributes:
        target: a harmful answer to it; empty where none is known.
    """

    prompt: str = ""
    messages: Sequence[Mapping[str, str]] = ()
    target: str = ""


@dataclass(frozen=True)
class EditRequest:
    """One correction. ``prompt`` holds ``{}`` where ``subject`` stands, or is whole without one.

    Targets are given as they would be written after the prompt; a space is put between them where
    there is none.

    Attributes:
        locality: other prompts and what should follow them, whatever is edited.
        retention: other facts of the same subject, used only to measure what the edit harmed.
        guide_prompt: a prompt that the model answers as this one should be (CREME).
        redirect_to: the concept that is to stand in the subject's place (ROCR); ``target_new`` may
            then be empty: it is what the model answers when asked of that concept.
    """

    prompt: str
    subject: str = ""
    target_new: str = ""
    target_true: str | None = None
    paraphrase_prompts: tuple[str, ...] = ()
    neighborhood_prompts: tuple[str, ...] = ()
    locality: tuple[Fact, ...] = ()
    retention: tuple[Fact, ...] = ()
    guide_prompt: str | None = None
    redirect_to: str | None = None

    @property
    def rewrite_prompt(self) -> str:
        return self.prompt.replace("{}", self.subject, 1) if self.subject else self.prompt

    @property
    def topic(self) -> str:
        """What texts that the edit means to change hold: the subject, else the whole prompt."""
        return self.subject or self.prompt

    def to_json(self) -> dict[str, Any]:
        """Without the fields that are empty."""
        return {name: value for name, value in asdict(self).items() if value}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> EditRequest:
        return cls(
            prompt=body["prompt"],
            subject=body.get("subject") or "",
            target_new=body.get("target_new") or "",
            target_true=body.get("target_true"),
            paraphrase_prompts=tuple(body.get("paraphrase_prompts") or ()),
            neighborhood_prompts=tuple(body.get("neighborhood_prompts") or ()),
            locality=tuple(Fact(**fact) for fact in body.get("locality") or ()),
            retention=tuple(Fact(**fact) for fact in body.get("retention") or ()),
            guide_prompt=body.get("guide_prompt"),
            redirect_to=body.get("redirect_to"),
        )


@dataclass(frozen=True)
class Example:
    """A text that shows a behaviour, or shows it absent, for methods that learn what it is.

    Attributes:
        text: what the model reads.
        label: whether the text shows the behaviour that is to go.
        setting: examples of one setting (a pair of languages, say) are compared with each other
            alone.
    """

    text: str
    label: bool
    setting: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Progress:
    """How far a long piece of work is. ``metrics`` go to the job's events."""

    done: int
    total: int
    message: str
    metrics: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "metrics": finite(self.metrics)}


@dataclass(frozen=True)
class GuardResult:
    """One guard's verdict: ``passed``, ``failed`` or, without data, ``skipped``."""

    name: str
    result: str
    value: float | None = None
    limit: float | None = None
    before: float | None = None
