"""Choose the next token of each row of logits.

A row is shaped first (penalties, then biases, then what may not come), then drawn from
(temperature, top_k, top_p, min_p). Every operation is a row's own: its bits do not depend on its
company.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from serving.guides import Guide
from serving.protocol import MAX_LOGPROBS, SamplingParams

#: The likeliest tokens among which a nucleus is looked for before all are sorted.
WINDOWS = (128, 2048)
#: Tokens whose probabilities are summed together in a draw.
BLOCK = 256
#: The lowest temperature; what lies below takes the most likely token just as well.
COLDEST = 1e-30


class Choice(NamedTuple):
    """A chosen token and, where asked for, its log-probability and the most likely tokens'.

    Log-probabilities are of the model's own distribution, before any shaping.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """One request's way to choose; its random numbers are its own, whoever shares the batch.

    Args:
        params: the way.
        prompt: the prompt's tokens, for the repetition penalty.
        ends: tokens that end the completion.
        guide: the request's place in its grammar.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int] = (),
        ends: frozenset[int] = frozenset(),
        guide: Guide | None = None,
    ) -> None:
        self.params = params
        self.guide = guide
        self._prompt = prompt
        self._ends = sorted(ends)
        self._taken = 0
        self._random: Random | None = None
        if params.temperature > 0:  # Random drops a seed's sign
            self._random = Random(None if params.seed is None else params.seed % 2**64)
        self._repeats = params.repetition_penalty != 1
        self._counts_tokens = params.presence_penalty != 0 or params.frequency_penalty != 0
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None
        self.shapes = bool(
            self._repeats
            or self._counts_tokens
            or params.logit_bias
            or params.min_tokens
            or guide is not None
        )
        self.way = _likeliest
        if params.temperature > 0:
            truncates = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
            self.way = _drawn_truncated if truncates else _drawn

    def draw(self) -> float:
        """The request's next random number, from 0 to below 1."""
        return 0.0 if self._random is None else self._random.random()

    def accept(self, token: int) -> None:
        """``token`` was chosen and stays in the completion."""
        self._taken += 1
        if self._seen is not None or self._counts is not None:
            self._count(token)
        if self.guide is not None:
            self.guide.accept(token)

    def shape(self, row: Tensor) -> None:
        """Penalties, biases, and -inf for what may not come; row [vocabulary], in place."""
        params = self.params
        if self._repeats:
            if self._seen is None:
                self._seen = torch.zeros_like(row, dtype=torch.bool)
                self._seen[list(self._prompt)] = True
            ids = self._seen.nonzero()[:, 0]
            seen, penalty = row[ids], params.repetition_penalty
            row[ids] = torch.where(seen > 0, seen / penalty, seen * penalty)
        if self._counts_tokens:
            if self._counts is None:
                self._counts = torch.zeros_like(row)
            ids = self._counts.nonzero()[:, 0]
            row[ids] -= params.frequency_penalty * self._counts[ids] + params.presence_penalty
        if params.logit_bias:
            tokens, biases = zip(*params.logit_bias, strict=True)
            row[list(tokens)] += torch.tensor(biases, dtype=row.dtype, device=row.device)
        if self._taken < params.min_tokens:
            row[self._ends] = -torch.inf
        if self.guide is not None:
            self.guide.mask(row)

    @torch.inference_mode()
    def _count(self, token: int) -> None:
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1


@torch.inference_mode()
def choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[Choice | None]:
    """The next token for each row of logits [n, vocabulary].

    None where a row's logits are not finite, or its guide lets nothing come (see its ``error``).
    """
    if not samplers:
        return []
    fine = logits.amax(-1).isfinite()
    shaped = logits
    if any(sampler.shapes for sampler in samplers):
        shaped = logits.clone()
        for row, sampler in zip(shaped, samplers, strict=True):
            if sampler.shapes:
                sampler.shape(row)
        fine &= shaped.amax(-1).isfinite()
    choices: list[Choice | None] = [None] * len(samplers)
    rows = [row for row, is_fine in enumerate(fine.tolist()) if is_fine]
    for way in (_likeliest, _drawn, _drawn_truncated):
        mine = [row for row in rows if samplers[row].way is way]
        if mine:
            tokens = way(_select(shaped, mine), [samplers[row] for row in mine])
            for row, token in zip(mine, tokens, strict=True):
                choices[row] = Choice(token)
    _report(logits, samplers, choices)
    return choices


def _report(logits: Tensor, samplers: Sequence[Sampler], choices: list[Choice | None]) -> None:
    """Add the log-probabilities to the choices whose requests ask for them."""
    asked = [
        (row, choice.token, most)
        for row, (choice, sampler) in enumerate(zip(choices, samplers, strict=True))
        if choice is not None and (most := sampler.params.logprobs) is not None
    ]
    if asked:
        rows, tokens, tops = zip(*asked, strict=True)
        found = logprobs(_select(logits, rows), tokens, max(tops))
        for row, choice, most in zip(rows, found, tops, strict=True):
            choices[row] = Choice(choice.token, choice.logprob, choice.top[:most])


@torch.inference_mode()
def logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[Choice]:
    """The log-probabilities of ``tokens``, one a row of logits [n, vocabulary], and of the ``top``
    most likely."""
    values = logits.log_softmax(-1)
    own = values.gather(-1, torch.tensor(tokens, device=values.device)[:, None])[:, 0].tolist()
    if not top:
        return [Choice(token, value) for token, value in zip(tokens, own, strict=True)]
    # always as many, since equal values come in another order where fewer are asked for
    best = values.topk(min(MAX_LOGPROBS, values.shape[-1]))
    return [
        Choice(token, value, tuple(zip(ids[:top], likely[:top], strict=True)))
        for token, value, ids, likely in zip(
            tokens, own, best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]


def combine(rows: Tensor, alpha: float) -> Tensor:
    """Proxy decoding's logits [vocabulary] of rows [3, vocabulary]: l0 + alpha (l1 - l2).

    Liu et al. 2024, "Tuning language models by proxy", equation 1.
    """
    return rows[0] + alpha * (rows[1] - rows[2])


def _select(logits: Tensor, rows: Sequence[int]) -> Tensor:
    if len(rows) == len(logits):
        return logits
    return logits.index_select(0, torch.tensor(rows, device=logits.device))


def _likeliest(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    tokens: list[int] = logits.argmax(-1).tolist()
    return tokens


def _drawn(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """By temperature alone. First a block of tokens is drawn, then a token of the block."""
    probabilities = _probabilities(logits, samplers)
    if missing := -probabilities.shape[-1] % BLOCK:
        probabilities = torch.nn.functional.pad(probabilities, (0, missing))
    blocks = probabilities.view(len(samplers), -1, BLOCK)
    sums = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    points = _column([sampler.draw() for sampler in samplers], sums) * sums[:, -1:]
    block = _passed(sums, points)
    before = sums.gather(-1, block) - blocks.sum(-1).gather(-1, block)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0]
    place = _passed(inside.cumsum(-1, dtype=torch.float64), points - before)
    tokens: list[int] = (block * BLOCK + place)[:, 0].tolist()
    return tokens


def _drawn_truncated(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """By temperature within top_k, top_p and min_p, looked for in ever wider windows."""
    probabilities = _probabilities(logits, samplers)
    draws = [sampler.draw() for sampler in samplers]
    size = probabilities.shape[-1]
    chosen = [0] * len(samplers)
    rows = list(range(len(samplers)))
    for window in (*WINDOWS, size):
        width = min(window, size)
        part = _select(probabilities, rows)
        if width < size:
            values, ids = part.topk(width)
        else:
            values, ids = part.sort(descending=True, stable=True)
        kept, sums = _kept(values, [samplers[row].params for row in rows])
        totals = sums.gather(-1, kept - 1)
        points = _column([draws[row] for row in rows], sums) * totals
        tokens = ids.gather(-1, _passed(sums, points, totals))[:, 0].tolist()
        for row, token in zip(rows, tokens, strict=True):
            chosen[row] = token
        if width == size:
            break
        rows = [
            row
            for row, count in zip(rows, kept[:, 0].tolist(), strict=True)
            if samplers[row].params.top_k != width
            and (count == width or samplers[row].params.top_k > width)
        ]
        if not rows:
            break
    return chosen


def _probabilities(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """[m, vocabulary] at each row's temperature."""
    coldness = [max(sampler.params.temperature, COLDEST) for sampler in samplers]
    scaled = logits - logits.amax(-1, keepdim=True)
    scaled /= _column(coldness, logits)
    return scaled.softmax(-1)


def _kept(values: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """How many of a row's values, highest first, remain [m, 1]; their running sums [m, width]."""
    width = values.shape[-1]
    sums = values.cumsum(-1, dtype=torch.float64)
    limits = [min(p.top_k or width, width) for p in params]
    top_k = torch.tensor(limits, device=values.device)[:, None]
    is_limited = torch.tensor([p.top_k > 0 for p in params], device=values.device)[:, None]
    mass = torch.where(is_limited, sums.gather(-1, top_k - 1), 1.0)
    remain = torch.arange(width, device=values.device) < top_k
    remain &= sums - values < _column([p.top_p for p in params], sums) * mass
    remain &= values >= _column([p.min_p for p in params], values) * values[:, :1]
    return remain.sum(-1, keepdim=True), sums


def _passed(sums: Tensor, points: Tensor, totals: Tensor | None = None) -> Tensor:
    """Where running sums [m, width] pass points [m, 1] below the totals: places [m, 1].

    A point at or past its total, by rounding, counts as just below it: a place without
    probability is never found.
    """
    totals = sums[:, -1:] if totals is None else totals
    points = points.minimum(totals.nextafter(torch.zeros_like(totals)))
    return torch.searchsorted(sums, points, right=True)


def _column(numbers: Sequence[float], like: Tensor) -> Tensor:
    """[m, 1]"""
    return torch.tensor(numbers, dtype=like.dtype, device=like.device)[:, None]
