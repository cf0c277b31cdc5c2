"""A stream: one request's sequence, and how its tokens become pieces."""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor

from serving.protocol import Piece, SamplingParams, TokenLogprob, TopLogprob, Usage
from serving.sampling import Sampler, logprobs
from serving.scheduler import Sequence
from serving.text import Decoder, Detokenizer, StopStrings
from serving.versions import Effects


class Stream:
    """A request in a lane.

    Args:
        sequence: its prompt, version and most tokens, as the scheduler sees them.
        params: how tokens are chosen.
        effects: the version's composed effects.
        decoder: the base's tokens as text.
        eos: tokens that end a completion.
    """

    def __init__(
        self,
        sequence: Sequence,
        params: SamplingParams,
        effects: Effects,
        decoder: Decoder,
        eos: frozenset[int],
    ) -> None:
        self.sequence = sequence
        self.effects = effects
        self.sampler = Sampler(params)
        self._params = params
        self._decoder = decoder
        self._eos = frozenset[int]() if params.ignore_eos else eos
        self._text = Detokenizer(decoder)
        self._stops = StopStrings(params.stop)
        self._count = 0

    @property
    def key(self) -> Hashable:
        return self.sequence.key

    def take(self, token: int, logits: Tensor) -> Piece:
        """The piece that a chosen token gives; logits [vocabulary] are those it came from."""
        if token in self._eos:
            return self._last(self._rest(), (), None, "stop")
        self._count += 1
        chances = (self._chance(token, logits),) if self._params.logprobs is not None else None
        text = self._stops.add(self._text.add(token))
        if self._stops.found:
            return self._last(text, (token,), chances, "stop")
        if self._count == self.sequence.max_tokens:
            text += self._rest()
            reason = "stop" if self._stops.found else "length"
            return self._last(text, (token,), chances, reason)
        return Piece(text, (token,), chances)

    def _rest(self) -> str:
        """The text held back so far, up to a stop string."""
        text = self._stops.add(self._text.finish())
        return text if self._stops.found else text + self._stops.finish()

    def _last(
        self,
        text: str,
        tokens: tuple[int, ...],
        chances: tuple[TokenLogprob, ...] | None,
        reason: str,
    ) -> Piece:
        usage = Usage(len(self.sequence.prompt), self._count)
        return Piece(text, tokens, chances, reason, usage)

    def _chance(self, token: int, logits: Tensor) -> TokenLogprob:
        value, best = logprobs(logits, token, self._params.logprobs or 0)
        text = self._decoder.token_text
        top = tuple(TopLogprob(id, text(id), logprob) for id, logprob in best)
        return TokenLogprob(token, text(token), value, top)
