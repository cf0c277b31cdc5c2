"""From tokens to text, piece by piece: whole characters only, and cut before a stop string."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"
#: The bytes that stand for themselves in a byte-level vocabulary; the others are moved past them.
_SHOWN = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_MOVED = (byte for byte in range(0x100) if byte not in _SHOWN)
_BYTES = {chr(b): b for b in _SHOWN} | {chr(0x100 + i): b for i, b in enumerate(_MOVED)}


class Decoder:
    """A base's tokens as text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        byte_tokens = {id for token, id in vocabulary.items() if _BYTE_TOKEN.fullmatch(token)}
        added = tokenizer.added_tokens_decoder.items()
        self._special = frozenset(id for id, token in added if token.special)
        #: Tokens that settle nothing: single bytes (byte fallback), whose text is known only when
        #: their run ends, and special tokens, which have no text and end no run.
        self.unsettling = self._special | byte_tokens
        self._parts = frozenset(_decoder_parts(tokenizer))
        self._texts: dict[int, str] = {}
        self._alone: dict[int, str] = {}

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones left out, spaces as they are."""
        if isinstance(self._tokenizer, PreTrainedTokenizerFast):  # a third of the time
            return self._tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=True)
        text = self._tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    def alone(self, token: int) -> str:
        """``decode`` of one token."""
        if (text := self._alone.get(token)) is None:
            text = self._alone[token] = self.decode([token])
        return text

    def token_text(self, token: int) -> str:
        """One token's own text, special ones too, with the space that begins it.

        Bytes that are part of a character are lone surrogates, as ``surrogateescape`` makes them.
        """
        if (text := self._texts.get(token)) is None:
            text = self._texts[token] = self._piece(token)
        return text

    def _piece(self, token: int) -> str:
        """What the vocabulary has for a token, where its kind is known; else its ``decode``."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if isinstance(piece, str) and token not in self._special:
            if "ByteLevel" in self._parts and all(character in _BYTES for character in piece):
                return bytes(map(_BYTES.__getitem__, piece)).decode(errors="surrogateescape")
            if "ByteFallback" in self._parts and (found := _BYTE_TOKEN.fullmatch(piece)):
                return bytes.fromhex(found[1]).decode(errors="surrogateescape")
            if _SPACE in self._parts:
                return piece.replace(_SPACE, " ")
        text = self._tokenizer.decode(
            [token], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)


def _decoder_parts(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The kinds of a tokenizer's decoders, and the sign that they make a space of."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return
    decoder = tokenizer.backend_tokenizer.decoder
    waiting: list[dict[str, Any]] = [] if decoder is None else [json.loads(decoder.__getstate__())]
    while waiting:
        part = waiting.pop()
        waiting += part.get("decoders", ())
        yield part["type"]
        if part["type"] == "Replace" and part["content"] == " ":
            yield part["pattern"].get("String", "")
        elif part["type"] == "Metaspace":
            yield part["replacement"]


class Detokenizer:
    """One completion's text as it grows; all pieces together are the text of all tokens.

    ``length`` is the number of characters emitted so far.

    A window of the last tokens is decoded, not all of them: what follows a settled piece of text
    (whole characters, no run of byte tokens) does not change it any more.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._tokens: list[int] = []
        self._start = 0  # first token of the window
        self._settled = 0  # tokens before this one are all emitted
        self._emitted = ""  # text of the window that was emitted
        self.length = 0

    def add(self, token: int) -> str:
        """The text that ``token`` settles."""
        self._tokens.append(token)
        if token in self._decoder.unsettling:
            return ""
        text = self._decoder.decode(self._tokens[self._start :])
        whole = text.rstrip(_REPLACEMENT)
        piece = whole[len(self._emitted) :]
        self.length += len(piece)
        if len(whole) == len(text):
            self._advance()
        else:
            self._emitted += piece
        return piece

    def finish(self) -> str:
        """The rest: what was held back and will not become whole."""
        return self._decoder.decode(self._tokens)[self.length :]

    def _advance(self) -> None:
        """Shrink the window to the tokens since the last settled place."""
        rest = self._tokens[self._settled :]
        emitted = self._decoder.alone(rest[0]) if len(rest) == 1 else self._decoder.decode(rest)
        if emitted:  # an empty text would not shield the next token from losing its space
            self._start = self._settled
        else:
            emitted = self._decoder.decode(self._tokens[self._start :])
        self._settled = len(self._tokens)
        self._emitted = emitted


class StopStrings:
    """Cuts a growing text before the first stop string, across pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """The text that is surely before any stop string; sets ``found`` when one is whole."""
        if not self._stops:
            return text
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found = True
            self._held = ""
            return text[: min(places)]
        keep = self._overlap(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, when no stop string came of it."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, text: str) -> int:
        """The longest end of the text with which a stop string begins."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
