"""From tokens to text, piece by piece: whole characters only, and cut before a stop string."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Decoder:
    """A base's tokens as text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        byte_tokens = {id for token, id in vocabulary.items() if _BYTE_TOKEN.fullmatch(token)}
        added = tokenizer.added_tokens_decoder.items()
        #: Tokens that settle nothing: single bytes (byte fallback), whose text is known only when
        #: their run ends, and special tokens, which have no text and end no run.
        self.unsettling = frozenset(byte_tokens | {id for id, token in added if token.special})
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
        """One token's own text, special ones too."""
        if (text := self._texts.get(token)) is None:
            text = self._texts[token] = str(
                self._tokenizer.decode(
                    [token], skip_special_tokens=False, clean_up_tokenization_spaces=False
                )
            )
        return text


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
