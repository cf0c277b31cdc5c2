"""The essence of a subject: what the model itself writes about it.

ROME keeps "{subject} is a" by a KL term. Here the model is let to write about the subject, in as
many words as it likes. What it says beside the edited fact is to be kept by an edit; where it
states the edited fact in other words than the prompt's, the new target is to be stated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from editing.models.generation import generate
from editing.models.view import ModelView
from registry.manifests import EditRequest

ANSWER_TOKENS = 12
#: A wording counts as the fact's where the model answers it with at least this probability.
STATED = 0.5


@dataclass(frozen=True)
class Essence:
    """Attributes:
    texts: what the model writes about the subject, up to where it would state the edited fact.
    wordings: other prompts for the edited fact, each holding the subject.
    answers: how the model begins to state the edited fact today: first tokens.
    """

    texts: tuple[str, ...]
    wordings: tuple[str, ...]
    answers: tuple[int, ...]


def sample_essence(
    view: ModelView, request: EditRequest, texts: int, tokens: int, wordings: int, seed: int
) -> Essence:
    """Sample ``texts`` continuations of the bare subject, of up to ``tokens`` tokens each.

    The edited fact is known by ``target_true`` and by the model's own greedy answer.
    """
    answers = _answers(view, request)
    firsts = {view.continuation(request.rewrite_prompt, answer)[1][0] for answer in answers}
    if texts == 0:
        return Essence((), (), tuple(sorted(firsts)))
    opening = view.open(request.subject)
    rows = generate(view, [opening] * texts, tokens, temperature=1.0, seed=seed)
    written = dict.fromkeys(view.decode([*opening, *row]) for row in rows)
    cut = {text: _cut(text, answers) for text in written}
    sentences = dict.fromkeys(
        re.split(r"(?<=[.!?])\s", kept)[-1] for text, kept in cut.items() if kept != text
    )
    candidates = [s for s in sentences if request.subject in s and s != request.rewrite_prompt]
    return Essence(
        texts=tuple(dict.fromkeys(cut.values())),
        wordings=tuple(_stating(view, candidates, answers)[:wordings]),
        answers=tuple(sorted(firsts)),
    )


def _answers(view: ModelView, request: EditRequest) -> list[str]:
    """How the edited fact is stated today: the given true target and the greedy answer."""
    (row,) = generate(view, [view.open(request.rewrite_prompt)], ANSWER_TOKENS)
    greedy = re.split(r"[.,;\n]", view.decode(row), maxsplit=1)[0]
    given = (request.target_true or "").strip()
    return [answer for answer in dict.fromkeys((given, greedy.strip())) if answer]


def _cut(text: str, answers: Sequence[str]) -> str:
    """The text up to the first place where an answer stands as a whole word."""
    for answer in answers:
        if found := re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text):
            text = text[: found.start()].rstrip()
    return text


@torch.no_grad()
def _stating(view: ModelView, prompts: Sequence[str], answers: Sequence[str]) -> list[str]:
    """The prompts that the model goes on with an answer's first token."""
    if not prompts or not answers:
        return []
    split = [[view.continuation(prompt, answer) for answer in answers] for prompt in prompts]
    rows = [pairs[0][0] for pairs in split]
    ends = torch.tensor([len(row) - 1 for row in rows], device=view.device)
    hidden = view.hidden(view.pad(rows))[torch.arange(len(rows), device=view.device), ends]
    shares = view.logits(hidden).softmax(-1)
    return [
        prompt
        for prompt, pairs, share in zip(prompts, split, shares, strict=True)
        if max(float(share[target[0]]) for _, target in pairs) >= STATED
    ]
