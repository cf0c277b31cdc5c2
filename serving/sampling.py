"""Choose the next token of each row of logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from serving.protocol import SamplingParams


class Sampler:
    """One request's way to choose; its random numbers are its own, whoever shares the batch."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._generator: torch.Generator | None = None
        if params.temperature > 0:
            self._generator = torch.Generator()
            if params.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(params.seed)

    def sample(self, logits: Tensor) -> int:
        """A token id by temperature, top_k and top_p; logits [vocabulary]."""
        scaled = logits.double()
        scaled = (scaled - scaled.max()) / self.params.temperature
        ids: Tensor | None = None
        if self.params.top_k or self.params.top_p < 1:
            scaled, ids = scaled.sort(descending=True, stable=True)
            scaled = scaled[: self.params.top_k or None]
        probabilities = scaled.softmax(0)
        cumulated = probabilities.cumsum(0)
        if self.params.top_p < 1:
            kept = int((cumulated - probabilities < self.params.top_p).sum())
            cumulated = cumulated[:kept]
        drawn = torch.rand((), generator=self._generator, dtype=torch.float64) * cumulated[-1]
        index = min(int(torch.searchsorted(cumulated, drawn, right=True)), len(cumulated) - 1)
        return index if ids is None else int(ids[index])


@torch.inference_mode()
def choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[int | None]:
    """The next token for each row of logits [n, vocabulary]; None where they are not finite."""
    if not samplers:
        return []
    highest, greedy = logits.max(-1)
    finite = highest.isfinite().tolist()
    chosen: list[int | None] = greedy.tolist()
    for row, sampler in enumerate(samplers):
        if not finite[row]:
            chosen[row] = None
        elif sampler.params.temperature > 0:
            chosen[row] = sampler.sample(logits[row])
    return chosen


@torch.inference_mode()
def logprobs(logits: Tensor, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """The log-probability of ``token`` and the ``top`` most likely (id, log-probability).

    One row [vocabulary] at a time: its bits do not depend on the batch.
    """
    values = logits.log_softmax(-1)
    best = values.topk(min(top, len(values)))
    return float(values[token]), list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
