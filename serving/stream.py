"""A stream: one request's sequence, and how its tokens become pieces."""

from __future__ import annotations

import time
from collections.abc import Hashable

from torch import Tensor

from registry.errors import ErrataError
from serving.guides import Guide
from serving.protocol import Piece, SamplingParams, Timing, TokenLogprob, TopLogprob, Usage
from serving.sampling import Choice, Sampler, combine, logprobs
from serving.scheduler import Sequence
from serving.text import Decoder, Detokenizer, StopStrings
from serving.versions import Effects


class Stream:
    """A request in a lane.

    Args:
        sequence: its prompt, versions and most tokens, as the scheduler sees them.
        params: how tokens are chosen.
        effects: each voice's composed effects.
        decoder: the base's tokens as text.
        eos: tokens that end a completion.
        guide: the request's place in its grammar.
        echo: the prompt as the first piece repeats it.
        alpha: how far the expert's logits move the first voice's; used with three voices only.
    """

    def __init__(
        self,
        sequence: Sequence,
        params: SamplingParams,
        effects: tuple[Effects, ...],
        decoder: Decoder,
        eos: frozenset[int],
        *,
        guide: Guide | None = None,
        echo: str | None = None,
        alpha: float = 0.0,
    ) -> None:
        self.sequence = sequence
        self.effects = effects
        self._ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos)
        self.sampler = Sampler(params, sequence.prompt, self._ends, guide)
        self._params = params
        self._decoder = decoder
        self._text = Detokenizer(decoder)
        self._stops = StopStrings(params.stop)
        self._count = 0
        self._guide = guide
        self._alpha = alpha
        self._echo = echo
        self._echoes = echo is not None
        self._begins = len(echo or "")  # characters before the completion
        self._asked = time.monotonic()
        self._begun: float | None = None  # when its first step began
        self._first: float | None = None  # when its first token was there
        self._prompt = _Prompt(sequence.prompt, decoder, echo or "")

    @property
    def key(self) -> Hashable:
        return self.sequence.key

    def begin(self, now: float) -> None:
        """A step that computes it begins."""
        if self._begun is None:
            self._begun = now

    def combine(self, rows: Tensor) -> Tensor:
        """The logits [vocabulary] to choose by, of each voice's [voices, vocabulary]."""
        return rows[0] if len(rows) == 1 else combine(rows, self._alpha)

    def prompt_logits(self, position: int, logits: Tensor) -> None:
        """Row i of logits [k, vocabulary] is the distribution after prompt token position + i.

        For sequences that want them, in order; rows that came before are passed over.
        """
        self._prompt.add(position, logits, self._params.logprobs or 0)

    def take(self, choice: Choice) -> Piece:
        """The piece that a chosen token gives.

        Raises:
            InvalidRequest: the request's grammar can be followed no further.
        """
        piece = self._take(choice)
        if self._first is None:
            self._first = time.monotonic()
            piece = piece._replace(prompt_tokens=len(self.sequence.prompt))
        if piece.finish_reason is not None:
            piece = piece._replace(timing=self._timing(self._first))
        if self._echo is None:
            return piece
        entries = piece.logprobs
        if self._params.logprobs is not None:
            entries = (*self._prompt.entries(), *(entries or ()))
        text, self._echo = self._echo, None
        return piece._replace(text=text + piece.text, logprobs=entries)

    def failure(self) -> ErrataError:
        """Why no token could be chosen."""
        if self._guide is not None and (error := self._guide.error) is not None:
            return error
        return ErrataError(
            "the version's logits are not finite for this prompt; a delta of its stack is too"
            " large",
            code="not_finite",
        )

    def _take(self, choice: Choice) -> Piece:
        if not self.sequence.max_tokens:
            return self._last("", (), None, "length")
        token = choice.token
        if token in self._ends:
            # whoever reads the prompt's entries counts on one for what was chosen after it
            entries = self._entries(choice) if self._echoes else None
            return self._last(self._rest(), (), entries, "stop")
        self._count += 1
        self.sampler.accept(token)
        if self._guide is not None and (error := self._guide.error) is not None:
            raise error
        entries = self._entries(choice)
        text = self._stops.add(self._text.add(token))
        if self._stops.found:
            return self._last(text, (token,), entries, "stop")
        is_whole = self._guide is not None and self._guide.is_finished
        if is_whole or self._count == self.sequence.max_tokens:
            text += self._rest()
            reason = "stop" if is_whole or self._stops.found else "length"
            return self._last(text, (token,), entries, reason)
        return Piece(text, (token,), entries)

    def _timing(self, first: float) -> Timing:
        begun = first if self._begun is None else self._begun
        return Timing(begun - self._asked, first - begun, time.monotonic() - first)

    def _rest(self) -> str:
        """The text held back so far, up to a stop string."""
        text = self._stops.add(self._text.finish())
        return text if self._stops.found else text + self._stops.finish()

    def _last(
        self,
        text: str,
        tokens: tuple[int, ...],
        entries: tuple[TokenLogprob, ...] | None,
        reason: str,
    ) -> Piece:
        usage = Usage(len(self.sequence.prompt), self._count, self.sequence.cached)
        return Piece(text, tokens, entries, reason, usage)

    def _entries(self, choice: Choice) -> tuple[TokenLogprob, ...] | None:
        if self._params.logprobs is None:
            return None
        return (_entry(choice, self._decoder, self._begins + self._text.length),)


class _Prompt:
    """A prompt's tokens with their log-probabilities, as they are computed."""

    def __init__(self, tokens: tuple[int, ...], decoder: Decoder, text: str) -> None:
        self._tokens = tokens
        self._decoder = decoder
        self._text = text
        self._choices: list[Choice] = []

    def add(self, position: int, logits: Tensor, top: int) -> None:
        """Rows of logits [k, vocabulary], of which the first comes after token ``position``."""
        known = len(self._choices) - position
        tokens = self._tokens[position + 1 :][known : len(logits)] if known >= 0 else ()
        if tokens:
            self._choices += logprobs(logits[known : known + len(tokens)], tokens, top)

    def entries(self) -> list[TokenLogprob]:
        """One a token; the first has no log-probability."""
        text = Detokenizer(self._decoder)
        # a tokenizer may put a space before a text: then the tokens' text is longer than the text
        lead = len(self._decoder.decode(self._tokens)) - len(self._text)
        entries = []
        for token, choice in zip(self._tokens, [None, *self._choices], strict=True):
            offset = max(0, text.length - lead)
            if choice is None:
                entries.append(
                    TokenLogprob(token, self._decoder.token_text(token), None, (), offset)
                )
            else:
                entries.append(_entry(choice, self._decoder, offset))
            text.add(token)
        return entries


def _entry(choice: Choice, decoder: Decoder, offset: int) -> TokenLogprob:
    text = decoder.token_text
    top = tuple(TopLogprob(id, text(id), logprob) for id, logprob in choice.top)
    return TokenLogprob(choice.token, text(choice.token), choice.logprob, top, offset)
