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

from editing.metrics.targets import batches
from editing.models.generation import generate
from editing.models.view import ModelView
from registry.manifests import EditRequest

ANSWER_TOKENS = 12
#: Rows of one generation.
ROWS = 256
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


def sample_essences(
    view: ModelView,
    requests: Sequence[EditRequest],
    texts: int,
    tokens: int,
    wordings: int,
    seed: int,
) -> list[Essence]:
    """Sample ``texts`` continuations of each bare subject, of up to ``tokens`` tokens each.

    The edited fact is known by ``target_true`` and by the model's own greedy answer.
    """
    answers = _answers(view, requests)
    firsts = [
        {view.continuation(request.rewrite_prompt, answer)[1][0] for answer in own}
        for request, own in zip(requests, answers, strict=True)
    ]
    if texts == 0:
        return [Essence((), (), tuple(sorted(own))) for own in firsts]
    openings = [view.open(request.subject) for request in requests for _ in range(texts)]
    rows = [
        row
        for start in range(0, len(openings), ROWS)
        for row in generate(
            view, openings[start : start + ROWS], tokens, temperature=1.0, seed=seed + start
        )
    ]
    whole = [view.decode([*opening, *row]) for opening, row in zip(openings, rows, strict=True)]
    cut: list[dict[str, str]] = []
    candidates: list[list[str]] = []
    for i, request in enumerate(requests):
        written = dict.fromkeys(whole[i * texts : (i + 1) * texts])
        cut.append({text: _cut(text, answers[i]) for text in written})
        sentences = dict.fromkeys(
            re.split(r"(?<=[.!?])\s", kept)[-1] for text, kept in cut[i].items() if kept != text
        )
        candidates.append(
            [s for s in sentences if request.subject in s and s != request.rewrite_prompt]
        )
    stating = _stating(view, candidates, answers)
    return [
        Essence(
            texts=tuple(dict.fromkeys(cut[i].values())),
            wordings=tuple(stating[i][:wordings]),
            answers=tuple(sorted(firsts[i])),
        )
        for i in range(len(requests))
    ]


def _answers(view: ModelView, requests: Sequence[EditRequest]) -> list[list[str]]:
    """How each edited fact is stated today: the given true target and the greedy answer."""
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].rewrite_prompt))
    greedy = [""] * len(requests)
    for start in range(0, len(order), ROWS):
        part = order[start : start + ROWS]
        prompts = [view.open(requests[i].rewrite_prompt) for i in part]
        for i, row in zip(part, generate(view, prompts, ANSWER_TOKENS), strict=True):
            greedy[i] = re.split(r"[.,;\n]", view.decode(row), maxsplit=1)[0].strip()
    given = [(request.target_true or "").strip() for request in requests]
    return [[a for a in dict.fromkeys(pair) if a] for pair in zip(given, greedy, strict=True)]


def _cut(text: str, answers: Sequence[str]) -> str:
    """The text up to the first place where an answer stands as a whole word."""
    for answer in answers:
        if found := re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text):
            text = text[: found.start()].rstrip()
    return text


@torch.no_grad()
def _stating(
    view: ModelView, prompts: Sequence[Sequence[str]], answers: Sequence[Sequence[str]]
) -> list[list[str]]:
    """Of each edit's prompts, those that the model goes on with an answer's first token."""
    split = [
        (i, prompt, [view.continuation(prompt, answer) for answer in answers[i]])
        for i, own in enumerate(prompts)
        for prompt in own
        if answers[i]
    ]
    found: list[list[str]] = [[] for _ in prompts]
    for batch in batches([len(pairs[0][0]) for _, _, pairs in split]):
        rows = [split[place][2][0][0] for place in batch]
        ends = torch.tensor([len(row) - 1 for row in rows], device=view.device)
        hidden = view.hidden(view.pad(rows))[torch.arange(len(rows), device=view.device), ends]
        shares = view.logits(hidden).softmax(-1)
        for place, share in zip(batch, shares, strict=True):
            i, prompt, pairs = split[place]
            if max(float(share[target[0]]) for _, target in pairs) >= STATED:
                found[i].append(prompt)
    return found
