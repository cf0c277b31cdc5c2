"""The loss of a rank-one edit, on the model as the edit would make it.

A change y' = y + (a·k) δ of one layer's MLP output leaves everything below as it is, a·k included:
what is below is computed once, and only the layers above are run again for another δ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from editing.models.view import ModelView, Tail

#: Texts to keep that one step looks at.
KEPT_BATCH = 8
#: From this probability of an answer's first token on, the model is about to state the fact.
ANSWERING = 0.02


@dataclass(frozen=True)
class Text:
    """Token ids, and the positions whose next token is watched."""

    ids: Sequence[int]
    positions: Sequence[int]


@dataclass(frozen=True)
class _Batch:
    """Padded texts: the layers above the edited one, a·k of each token, watched positions."""

    tail: Tail
    coefficient: Tensor  # [n, T]
    rows: Tensor  # [m]
    positions: Tensor  # [m]

    def hidden(self, delta: Tensor) -> Tensor:
        """Last hidden states of the model edited by δ at the watched positions: [m, hidden]."""
        return self.tail.run(self.coefficient[..., None] * delta)[self.rows, self.positions]


class Objective:
    """NLL of what is to be said and KL on what is to be kept, as functions of δ [hidden].

    Args:
        a: the rank-one effect's key [in], so that the effect on an input k is (a·k) δ.
        said: texts that end with the new target, watched where they predict it.
        kept: texts to keep; in batches of like length, of which each step looks at one.
        answers: first tokens of the edited fact as it is stated today. Where the model is about
            to say one of them nothing is kept.
    """

    def __init__(
        self,
        view: ModelView,
        layer: int,
        a: Tensor,
        said: Sequence[Text],
        kept: Sequence[Text],
        answers: Sequence[int],
    ) -> None:
        self._view = view
        self.device = view.device
        self._said = _batch(view, layer, a, said)
        targets = [text.ids[p + 1] for text in said for p in text.positions]
        self._targets = torch.tensor(targets, device=view.device)
        ordered = sorted(kept, key=lambda text: len(text.ids))
        self._kept = [
            self._watch(_batch(view, layer, a, ordered[start : start + KEPT_BATCH]), answers)
            for start in range(0, len(ordered), KEPT_BATCH)
        ]

    @torch.no_grad()
    def _watch(self, batch: _Batch, answers: Sequence[int]) -> tuple[_Batch, Tensor]:
        """Drop positions that are about to state the fact; log-probabilities [m, vocabulary]."""
        unchanged = torch.zeros(self._view.hidden_size, device=self.device)
        before = self._view.logits(batch.hidden(unchanged)).log_softmax(-1)
        if answers:
            watched = before[:, list(answers)].exp().amax(-1) < ANSWERING
            batch = replace(batch, rows=batch.rows[watched], positions=batch.positions[watched])
            before = before[watched]
        return batch, before

    def nll(self, delta: Tensor) -> Tensor:
        """Of each target token in each text to say: [m]."""
        logits = self._view.logits(self._said.hidden(delta))
        return F.cross_entropy(logits, self._targets, reduction="none")

    def kl(self, delta: Tensor, step: int) -> Tensor:
        """KL(before ‖ after), summed over a text's positions, averaged over this step's texts."""
        if not self._kept:
            return delta.new_zeros(())
        batch, before = self._kept[step % len(self._kept)]
        after = self._view.logits(batch.hidden(delta)).log_softmax(-1)
        return F.kl_div(after, before, reduction="sum", log_target=True) / len(batch.coefficient)


def _batch(view: ModelView, layer: int, a: Tensor, texts: Sequence[Text]) -> _Batch:
    rows = [text.ids for text in texts]
    keys = view.inputs({layer: view.down_proj(layer)}, rows)[layer]
    watched = [(i, p) for i, text in enumerate(texts) for p in text.positions]
    index = torch.tensor(watched, device=view.device)
    return _Batch(view.tail(layer, view.pad(rows)), keys @ a, index[:, 0], index[:, 1])
