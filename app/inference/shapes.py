"""OpenAI's answers: text completions and chat completions, whole and in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from app.inference.generate import Completion
from app.inference.resolve import Resolved
from serving.protocol import TokenLogprob, TopLogprob


@dataclass
class TextShape:
    """``/v1/completions``."""

    resolved: Resolved
    id: str = field(default_factory=lambda: "cmpl-" + secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.resolved.model,
            "version": self.resolved.manifest.id,
            "generation": self.resolved.generation,
        }

    def whole(
        self, completions: Sequence[Completion], usage: dict[str, int], logprobs: bool
    ) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "text": c.text,
                "finish_reason": c.finish_reason,
                "logprobs": _text_logprobs(c.logprobs, 0) if logprobs else None,
            }
            for index, c in enumerate(completions)
        ]
        return {**self._envelope("text_completion"), "choices": choices, "usage": usage}

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def chunk(
        self,
        index: int,
        text: str,
        logprobs: Sequence[TokenLogprob] | None,
        finish_reason: str | None,
        offset: int,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "text": text,
            "finish_reason": finish_reason,
            "logprobs": None if logprobs is None else _text_logprobs(logprobs, offset),
        }
        return {**self._envelope("text_completion"), "choices": [choice]}

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        return {**self._envelope("text_completion"), "choices": [], "usage": usage}


@dataclass
class ChatShape(TextShape):
    """``/v1/chat/completions``."""

    id: str = field(default_factory=lambda: "chatcmpl-" + secrets.token_hex(12))

    def whole(
        self, completions: Sequence[Completion], usage: dict[str, int], logprobs: bool
    ) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": c.text, "refusal": None},
                "finish_reason": c.finish_reason,
                "logprobs": _chat_logprobs(c.logprobs) if logprobs else None,
            }
            for index, c in enumerate(completions)
        ]
        return {**self._envelope("chat.completion"), "choices": choices, "usage": usage}

    def opening(self, index: int) -> dict[str, Any] | None:
        return self._delta(index, {"role": "assistant", "content": ""}, None, None)

    def chunk(
        self,
        index: int,
        text: str,
        logprobs: Sequence[TokenLogprob] | None,
        finish_reason: str | None,
        offset: int,
    ) -> dict[str, Any]:
        delta = {"content": text} if text or finish_reason is None else {}
        return self._delta(
            index, delta, None if logprobs is None else _chat_logprobs(logprobs), finish_reason
        )

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        return {**self._envelope("chat.completion.chunk"), "choices": [], "usage": usage}

    def _delta(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None,
        finish_reason: str | None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "finish_reason": finish_reason,
            "logprobs": logprobs,
        }
        return {**self._envelope("chat.completion.chunk"), "choices": [choice]}


def _text_logprobs(logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    offsets = []
    for entry in logprobs:
        offsets.append(offset)
        offset += len(entry.text)
    return {
        "tokens": [entry.text for entry in logprobs],
        "token_logprobs": [entry.logprob for entry in logprobs],
        "top_logprobs": [{t.text: t.logprob for t in entry.top} for entry in logprobs],
        "text_offset": offsets,
    }


def _chat_logprobs(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    def shown(entry: TokenLogprob | TopLogprob) -> dict[str, Any]:
        return {
            "token": entry.text,
            "logprob": entry.logprob,
            "bytes": list(entry.text.encode()),
        }

    return {
        "content": [
            {**shown(entry), "top_logprobs": [shown(t) for t in entry.top]} for entry in logprobs
        ],
        "refusal": None,
    }
