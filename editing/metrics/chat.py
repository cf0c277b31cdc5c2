"""Prompts asked as users ask them: through the base's chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from editing.metrics.targets import Pair
from editing.models.generation import greedy
from editing.models.view import ModelView

#: Tokens that an answer may have beside its target: a chat model says it in a sentence.
TOKENS_AROUND = 32


def chat_matches(view: ModelView, pairs: Sequence[Pair]) -> list[bool]:
    """Whether the greedy answer to each prompt, sent as a user's message, states the target.

    Anywhere in the answer's first tokens, as whole words: a chat model says a sentence where the
    bare prompt is completed.
    """
    rows = [chat_row(view, [{"role": "user", "content": prompt}]) for prompt, _ in pairs]
    lengths = [len(view.continuation(p, target)[1]) + TOKENS_AROUND for p, target in pairs]
    answers = greedy(view, rows, lengths)
    return [
        states(view.decode(ids), target) for ids, (_, target) in zip(answers, pairs, strict=True)
    ]


def states(text: str, target: str) -> bool:
    """Whether a text holds the target as whole words."""
    target = target.strip()
    before = r"(?<!\w)" if target[:1].isalnum() else ""
    after = r"(?!\w)" if target[-1:].isalnum() else ""
    return re.search(before + re.escape(target) + after, text) is not None


def chat_row(view: ModelView, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of a conversation as the chat template writes it, up to the assistant's answer.

    Raises:
        InvalidRequest: the template refuses it.
    """
    return view.chat_ids(view.chat(messages))
