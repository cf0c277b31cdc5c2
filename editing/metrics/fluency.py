"""Fluency: the weighted entropy of n-grams in generated text (Zhang et al., 2018; as in ROME).

A model that an edit broke says the same over and over: few n-grams, low entropy.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from editing.metrics.sampling import spaced
from editing.models.generation import generate
from editing.models.view import ModelView

PROMPTS = 8
TOKENS = 64
#: By n, as ROME weighs them.
WEIGHTS = {2: 2 / 3, 3: 4 / 3}


def fluency(view: ModelView, prompts: Sequence[str], seed: int = 0) -> float | None:
    """Mean n-gram entropy, in bits, of what the model writes after some of the prompts.

    Sampled at temperature 1 (ROME: top 5; it publishes a hundred times the figure). None where
    nothing is written that has n-grams.
    """
    prompts = spaced(prompts, PROMPTS)
    if not prompts:
        return None
    rows = [view.open(prompt) for prompt in prompts]
    made = generate(view, rows, TOKENS, temperature=1.0, seed=seed)
    texts = [prompt + " " + view.decode(ids) for prompt, ids in zip(prompts, made, strict=True)]
    entropies = [e for e in map(n_gram_entropy, texts) if e is not None]
    return math.fsum(entropies) / len(entropies) if entropies else None


def n_gram_entropy(text: str) -> float | None:
    """Σ_n w_n H_n / 2 with H_n the entropy, in bits, of the frequencies of a text's n-grams.

    Tokens are words and single marks. None for a text too short for its longest n-gram.
    """
    words = re.findall(r"\w+|[^\w\s]", text)
    if len(words) < max(WEIGHTS):
        return None
    return sum(w * _entropy(words, n) for n, w in WEIGHTS.items()) / len(WEIGHTS)


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    total = counts.total()
    return -sum(c / total * math.log2(c / total) for c in counts.values())
