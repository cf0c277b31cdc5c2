"""Tokens of the base's texts whose predictions an edit is to leave as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from editing.metrics.sampling import spaced
from editing.metrics.targets import batches
from editing.models.resuming import Point, Resuming
from editing.models.view import ModelView
from registry.manifests import EditRequest

#: Ids of a text, and the positions whose next token's prediction is looked at.
Row = tuple[Sequence[int], range]
#: Texts in which places like an edit's are looked for, and how many predictions from one on count.
NEAR_TEXTS, NEAR_TOKENS = 1000, 4
#: Such places of each edit.
NEAR = 64


def unaffected(texts: Sequence[str], edits: Sequence[EditRequest]) -> list[str]:
    """The texts that do not state an edited fact: an edit's subject with its true target.

    Where the true target is not given, those that do not name the subject.
    """
    facts = [(edit.subject, edit.target_true or "") for edit in edits if edit.subject]
    return [text for text in texts if not any(s in text and o in text for s, o in facts)]


def whole(view: ModelView, texts: Sequence[str]) -> list[Row]:
    """Every prediction of each text."""
    encoded = [view.excerpt(text) for text in texts]
    return [(ids, range(len(ids) - 1)) for ids in encoded if len(ids) > 1]


def near(
    resuming: Resuming,
    said: Sequence[Row],
    edits: Sequence[EditRequest],
    texts: Sequence[str],
    count: int = NEAR,
) -> list[Row]:
    """Of each edit ``count`` texts on other topics, from where a linear is given what it is given
    at the end of the edit's prompt, or most nearly (by cosine).

    What answers the prompt is written there, so that these places answer too: they are what an
    edit of few prompts reaches beyond them, the same question about other subjects.

    Args:
        resuming: at the linear.
        said: each edit's prompt with its target, watched from where the target begins.
    """
    view = resuming.view
    chosen = spaced([text for text in texts if len(view.encode(text)) > 1], NEAR_TEXTS)
    if not chosen:
        return []
    rows = [ids for ids, _ in whole(view, chosen)]
    asked = {  # copies, since views would keep the whole points in memory
        i: point.inputs[said[i][1].start].clone()
        for i, point in _points(resuming, [ids for ids, _ in said])
    }
    keys = F.normalize(torch.stack([asked[i] for i in range(len(said))]).float(), dim=-1)
    likeness = torch.zeros(len(edits), len(rows))
    places = torch.zeros(len(edits), len(rows), dtype=torch.long)
    for i, point in _points(resuming, rows):
        cosines = keys @ F.normalize(point.inputs[:-1].float(), dim=-1).T
        likeness[:, i], places[:, i] = (found.cpu() for found in cosines.max(-1))
    named = torch.tensor([[edit.topic in text for text in chosen] for edit in edits])
    likeness[named] = -1
    nearest = likeness.topk(min(count, len(rows)))
    found = {
        (text, int(places[edit, text]))
        for edit, (alike, of_edit) in enumerate(zip(*map(Tensor.tolist, nearest), strict=True))
        for cosine, text in zip(alike, of_edit, strict=True)
        if cosine > 0
    }
    return [
        (rows[text], range(start, min(start + NEAR_TOKENS, len(rows[text]) - 1)))
        for text, start in sorted(found)
    ]


def _points(resuming: Resuming, rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, Point]]:
    """Each row's place and its point, a few at a time."""
    for batch in batches([len(row) for row in rows]):
        yield from zip(batch, resuming.points([rows[i] for i in batch]), strict=True)
