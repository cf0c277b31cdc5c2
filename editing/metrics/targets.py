"""How a model continues prompts: likelihood of given targets, and what it really writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from editing.models.generation import generate
from editing.models.view import ModelView

TOKENS_PER_FORWARD = 4096
ROWS_PER_GENERATION = 64

Pair = tuple[str, str]


@torch.no_grad()
def score_targets(view: ModelView, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
    """For each (prompt, target): the NLL per target token, and whether each is the argmax."""
    split = [view.continuation(prompt, target) for prompt, target in pairs]
    rows = [[*before, *target] for before, target in split]
    scores: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    for batch in batches([len(row) for row in rows]):
        hidden = view.hidden(view.pad([rows[i] for i in batch]))
        for place, i in enumerate(batch):
            before, target = split[i]
            logits = view.logits(hidden[place, len(before) - 1 : len(rows[i]) - 1])
            wanted = torch.tensor(target, device=view.device)
            nll = torch.nn.functional.cross_entropy(logits, wanted)
            scores[i] = (nll.item(), bool((logits.argmax(-1) == wanted).all()))
    return scores


def greedy_matches(view: ModelView, pairs: Sequence[Pair]) -> list[bool]:
    """Whether greedy generation from each prompt begins with its target, as whole words."""
    split = [view.continuation(prompt, target) for prompt, target in pairs]
    matches = [False] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: len(split[i][0]))
    for start in range(0, len(order), ROWS_PER_GENERATION):
        batch = order[start : start + ROWS_PER_GENERATION]
        longest = max(len(split[i][1]) for i in batch)
        made = generate(view, [split[i][0] for i in batch], longest + 2)
        for i, ids in zip(batch, made, strict=True):
            matches[i] = begins_with(view.decode(ids), pairs[i][1])
    return matches


def begins_with(text: str, target: str) -> bool:
    """Whether a text begins with the target and does not go on in the middle of a word."""
    text, target = text.strip(), target.strip()
    after = text[len(target) : len(target) + 1]
    return text.startswith(target) and not (target[-1:].isalnum() and after.isalnum())


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of rows of like length together, about ``TOKENS_PER_FORWARD`` padded tokens each."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > TOKENS_PER_FORWARD:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
