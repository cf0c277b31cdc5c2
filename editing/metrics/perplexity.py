"""ME-PPL: the mean of per-sentence perplexities (The Butterfly Effect, arXiv:2402.09656).

One collapsed sentence raises the mean, where a corpus perplexity would hide it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from editing.metrics.targets import batches
from editing.models.view import ModelView


def me_ppl(view: ModelView, texts: Sequence[str]) -> float | None:
    """Mean over texts of exp(mean NLL of a text's tokens after the first); None without texts."""
    perplexities = [math.exp(nll) if nll < 700 else math.inf for nll in text_nlls(view, texts)]
    return math.fsum(perplexities) / len(perplexities) if perplexities else None


def text_nlls(view: ModelView, texts: Sequence[str]) -> list[float]:
    """The mean NLL, in nats, of each text's tokens after the first; texts of one token are left
    out. The order is not that of the texts."""
    return [nlls.mean().item() for nlls in token_nlls(view, texts)]


@torch.no_grad()
def token_nlls(view: ModelView, texts: Sequence[str]) -> list[Tensor]:
    """The NLL, in nats, of each of a text's tokens after the first; as ``text_nlls`` otherwise."""
    rows = [view.excerpt(text) for text in texts]
    rows = [row for row in rows if len(row) > 1]
    found = []
    for batch in batches([len(row) for row in rows]):
        ids = view.pad([rows[i] for i in batch])
        hidden = view.hidden(ids)
        for place, i in enumerate(batch):
            n = len(rows[i])
            logits = view.logits(hidden[place, : n - 1])
            found.append(F.cross_entropy(logits, ids[place, 1:n], reduction="none"))
    return found
