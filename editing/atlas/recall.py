"""How many facts a model recalls: greedy, the whole object and the full stop after it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from editing.atlas.corpus import BOS, hidden_subjects, word
from editing.atlas.facts import AtlasFact
from editing.atlas.templates import HELD_OUT, SEEN, TEMPLATES, UNSEEN, prompt_of

SAMPLE = 1500
BATCH = 250


def recall(
    model: PreTrainedModel, tokenizer: Tokenizer, facts: Sequence[AtlasFact], seed: int = 0
) -> dict[str, float]:
    """Shares right on seen wordings, on wordings held out for the subject, on unseen wordings."""
    hidden = hidden_subjects(facts)
    pools = {
        "seen": [(f, i) for f in facts for i in SEEN],
        "held-out": [(f, i) for f in facts if f.subject in hidden for i in HELD_OUT],
        "unseen": [(f, i) for f in facts for i in UNSEEN],
    }
    picker = random.Random(seed)
    return {
        name: _share(model, tokenizer, picker.sample(pool, min(SAMPLE, len(pool))))
        for name, pool in pools.items()
    }


@torch.no_grad()
def _share(
    model: PreTrainedModel, tokenizer: Tokenizer, cases: Sequence[tuple[AtlasFact, int]]
) -> float:
    """Greedy decoding gives the object exactly where each of its tokens is the argmax."""
    bos = tokenizer.token_to_id(BOS)
    right = 0
    for start in range(0, len(cases), BATCH):
        rows, starts = [], []
        for fact, index in cases[start : start + BATCH]:
            template = TEMPLATES[fact.relation][index]
            prompt = prompt_of(template).replace("{}", fact.subject)
            rows.append([bos, *tokenizer.encode(word(template, fact).text).ids[1:]])
            starts.append(len(tokenizer.encode(prompt).ids))
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        guesses = model(input_ids=ids, use_cache=False).logits.argmax(-1)
        for i, (row, n) in enumerate(zip(rows, starts, strict=True)):
            right += bool((guesses[i, n - 1 : len(row) - 1] == ids[i, n : len(row)]).all())
    return right / len(cases)
