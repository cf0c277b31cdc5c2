"""OpenAI's answers: text completions and chat completions, whole and in chunks."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from app.inference.generate import Completion
from app.inference.resolve import Admitted
from serving.protocol import Piece, TokenLogprob, TopLogprob


@dataclass
class TextShape:
    """``/v1/completions``."""

    admitted: Admitted
    id: str = field(default_factory=lambda: "cmpl-" + secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def _envelope(self, kind: str) -> dict[str, Any]:
        resolved, proxy = self.admitted.resolved, self.admitted.proxy
        envelope: dict[str, Any] = {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": resolved.model,
            "version": resolved.manifest.id,
            "generation": resolved.generation,
        }
        if proxy is not None:
            envelope["proxy"] = {
                "expert": proxy.expert.id,
                "anti_expert": proxy.anti_expert.id,
                "alpha": proxy.alpha,
            }
        return envelope

    def whole(
        self, completions: Sequence[Completion], usage: dict[str, Any], logprobs: bool
    ) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "text": c.text,
                "finish_reason": c.finish_reason,
                "logprobs": _text_logprobs(c.logprobs) if logprobs else None,
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
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "text": text,
            "finish_reason": finish_reason,
            "logprobs": None if logprobs is None else _text_logprobs(logprobs),
        }
        return {**self._envelope("text_completion"), "choices": [choice]}

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._envelope("text_completion"), "choices": [], "usage": usage}


@dataclass
class ChatShape(TextShape):
    """``/v1/chat/completions``."""

    id: str = field(default_factory=lambda: "chatcmpl-" + secrets.token_hex(12))

    def whole(
        self, completions: Sequence[Completion], usage: dict[str, Any], logprobs: bool
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
    ) -> dict[str, Any]:
        delta = {"content": text} if text or finish_reason is None else {}
        return self._delta(
            index, delta, None if logprobs is None else _chat_logprobs(logprobs), finish_reason
        )

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
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


class ChunkEvents:
    """One choice's chunks as server-sent events.

    Most chunks differ in their text alone, so what stands around it is written once.
    """

    def __init__(self, shape: TextShape, index: int) -> None:
        self._shape = shape
        self._index = index
        opening = shape.opening(index)
        self.opening = b"" if opening is None else as_event(opening)
        mark = "\0"
        self._head, self._tail = as_event(shape.chunk(index, mark, None, None)).split(
            json.dumps(mark).encode()
        )

    def of(self, piece: Piece) -> bytes:
        """The event of a piece; empty where it has nothing to show yet."""
        if piece.logprobs is None and piece.finish_reason is None:
            if not piece.text:
                return b""
            return self._head + json.dumps(piece.text, ensure_ascii=False).encode() + self._tail
        return as_event(
            self._shape.chunk(self._index, piece.text, piece.logprobs, piece.finish_reason)
        )


def as_event(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()


def _text_logprobs(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {
        "tokens": [_name(entry) for entry in logprobs],
        "token_logprobs": [entry.logprob for entry in logprobs],
        "top_logprobs": [
            None if entry.logprob is None else _likeliest(entry.top) for entry in logprobs
        ],
        "text_offset": [entry.offset for entry in logprobs],
    }


def _chat_logprobs(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    def shown(entry: TokenLogprob | TopLogprob) -> dict[str, Any]:
        return {
            "token": _name(entry),
            "logprob": entry.logprob,
            "bytes": list(_bytes(entry)),
        }

    return {
        "content": [
            {**shown(entry), "top_logprobs": [shown(t) for t in entry.top]} for entry in logprobs
        ],
        "refusal": None,
    }


def _bytes(entry: TokenLogprob | TopLogprob) -> bytes:
    return entry.text.encode(errors="surrogateescape")


def _name(entry: TokenLogprob | TopLogprob) -> str:
    """A token's text; as OpenAI does, its bytes where they are no whole characters."""
    text = _bytes(entry).decode(errors="backslashreplace")
    return text if text == entry.text else f"bytes:{text}"


def _likeliest(top: Sequence[TopLogprob]) -> dict[str, float]:
    """By name, the first of each: several tokens may have one text."""
    named: dict[str, float] = {}
    for entry in top:
        named.setdefault(_name(entry), entry.logprob)
    return named
