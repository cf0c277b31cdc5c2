"""Prompts asked as users ask them: through the base's chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence

from editing.metrics.targets import ROWS_PER_GENERATION, Pair
from editing.models.generation import generate
from editing.models.view import ModelView

#: Tokens that an answer may have beside its target: a chat model says it in a sentence.
TOKENS_AROUND = 32


def chat_matches(view: ModelView, pairs: Sequence[Pair]) -> list[bool]:
    """Whether the greedy answer to each prompt, sent as a user's message, states the target.

    Anywhere in the answer's first tokens, as whole words: a chat model says a sentence where the
    bare prompt is completed.
    """
    rows = [_row(view, prompt) for prompt, _ in pairs]
    lengths = [len(view.continuation(p, target)[1]) + TOKENS_AROUND for p, target in pairs]
    matches = [False] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), ROWS_PER_GENERATION):
        batch = order[start : start + ROWS_PER_GENERATION]
        made = generate(view, [rows[i] for i in batch], max(lengths[i] for i in batch))
        for i, ids in zip(batch, made, strict=True):
            matches[i] = states(view.decode(ids[: lengths[i]]), pairs[i][1])
    return matches


def states(text: str, target: str) -> bool:
    """Whether a text holds the target as whole words."""
    target = target.strip()
    before = r"(?<!\w)" if target[:1].isalnum() else ""
    after = r"(?!\w)" if target[-1:].isalnum() else ""
    return re.search(before + re.escape(target) + after, text) is not None


def _row(view: ModelView, prompt: str) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    text = view.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(view.tokenizer(text, add_special_tokens=False)["input_ids"])
