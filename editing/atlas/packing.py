"""Rows of whole documents, and the attention masks that keep a subject at its last token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from tokenizers import Tokenizer
from torch import Tensor

from editing.atlas.corpus import BOS, EOS, Corpus

OPEN_ROWS = 48
CHUNK = 2000


@dataclass
class Row:
    """Token ids, each token's document, and each token's index past its subject's last token.

    ``hidden_from[i]`` is the first position that may not attend to token i in a masked row (the
    row's length where nothing is hidden).
    """

    ids: list[int] = field(default_factory=list)
    document: list[int] = field(default_factory=list)
    hidden_from: list[int] = field(default_factory=list)


def rows(corpus: Corpus, tokenizer: Tokenizer, length: int) -> Iterator[Row]:
    """Fill rows of ``length`` tokens with whole documents, first fit."""
    bos, eos = tokenizer.encode(BOS + EOS, add_special_tokens=False).ids
    stream = iter(corpus)
    open_rows: list[Row] = []
    while True:
        chunk = list(islice(stream, CHUNK))
        encoded = tokenizer.encode_batch([d.text for d in chunk], add_special_tokens=False)
        for document, encoding in zip(chunk, encoded, strict=True):
            ids = [bos, *encoding.ids, eos]
            if len(ids) > length:
                continue
            row = next((r for r in open_rows if len(r.ids) + len(ids) <= length), None)
            if row is None:
                open_rows.append(row := Row())
            _append(row, ids, encoding.offsets, document.subjects, length)
            if len(row.ids) > length - 8 or len(open_rows) > OPEN_ROWS:
                open_rows.remove(row)
                yield row


def _append(
    row: Row,
    ids: list[int],
    offsets: list[tuple[int, int]],
    subjects: tuple[tuple[int, int], ...],
    length: int,
) -> None:
    base = len(row.ids)
    hidden_from = [length] * len(ids)
    for start, end in subjects:
        inside = [i + 1 for i, (a, b) in enumerate(offsets) if a < end and b > start]
        for i in inside[:-1]:
            hidden_from[i] = base + inside[-1] + 1
    row.document += [row.document[-1] + 1 if row.document else 0] * len(ids)
    row.ids += ids
    row.hidden_from += hidden_from


def collate(batch: list[Row], length: int, masked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows -> ids [B, T], labels [B, T] (-100 where no document goes on), mask [B, 1, T, T].

    ``masked`` [B] says in which rows tokens after a subject see only the subject's last token.
    """
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    document = torch.full((len(batch), length), -1)
    hidden_from = torch.full((len(batch), length), length)
    for i, row in enumerate(batch):
        n = len(row.ids)
        ids[i, :n] = torch.tensor(row.ids)
        document[i, :n] = torch.tensor(row.document)
        hidden_from[i, :n] = torch.tensor(row.hidden_from)
    labels = torch.full_like(ids, -100)
    goes_on = (document[:, 1:] == document[:, :-1]) & (document[:, 1:] >= 0)
    labels[:, :-1] = torch.where(goes_on, ids[:, 1:], -100)
    position = torch.arange(length)
    mask = (document[:, :, None] == document[:, None, :]) & (position[:, None] >= position)
    hidden = masked[:, None, None] & (position[:, None] >= hidden_from[:, None, :])
    return ids, labels, (mask & ~hidden)[:, None]
