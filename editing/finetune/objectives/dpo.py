"""Direct preference optimisation (Rafailov et al., 2023, arXiv:2305.18290)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from editing.finetune.objectives.objective import Objective, Tuned, log_probabilities
from editing.finetune.rows import PreferenceRow, chunks, preference_row
from editing.models.packing import packed
from editing.models.view import ModelView

#: Of one flat row when the reference is asked, and of its logits; a longer pair is a row of its own
#: and takes less than in a step.
REFERENCE_TOKENS, REFERENCE_LOGITS = 4096, 2**24
#: As trl names them; each is a mean over pairs.
METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


@dataclass(frozen=True)
class Dpo(Objective[PreferenceRow]):
    """The chosen answer's implicit reward is to exceed the rejected one's.

    With r(y) = β (log π(y|x) − log π_ref(y|x)) and the margin m = r(y_w) − r(y_l), the loss of a
    pair is −(1 − ε) log σ(m) − ε log σ(−m) − λ log π(y_w|x) / |y_w|. The reference π_ref is the
    version that is tuned, without the adapter: its log-probabilities are part of the rows.

    Attributes:
        beta: β.
        label_smoothing: ε, of conservative DPO (Mitchell, 2023).
        sft_weight: λ, of RPO (Pang et al., 2024, arXiv:2404.19733).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    sft_weight: float = 0.0

    def row(self, view: ModelView, example: Mapping[str, Any]) -> PreferenceRow:
        return preference_row(view, example)

    @torch.no_grad()
    def rows(self, view: ModelView, examples: Sequence[Mapping[str, Any]]) -> list[PreferenceRow]:
        """With what the reference says of them: no adapter may be active in ``view``."""
        found = []
        tokens = min(REFERENCE_TOKENS, REFERENCE_LOGITS // view.model.config.vocab_size)
        with packed(view):
            for chunk in chunks(super().rows(view, examples), tokens):
                for row, (chosen, rejected) in zip(chunk, _sums(view, chunk).tolist(), strict=True):
                    found.append(replace(row, reference=(chosen, rejected)))
        return found

    def backward(self, tuned: Tuned, rows: Sequence[PreferenceRow], seed: int) -> dict[str, float]:
        total = torch.zeros(len(METRICS))
        for chunk in chunks(rows, tuned.tokens):
            with tuned.active():
                loss, read = self._read(tuned.view, chunk)
                torch.autograd.backward(loss / len(rows))
            total += read
        told = dict(zip(METRICS, (total / len(rows)).tolist(), strict=True))
        loss_value, tokens = told.pop("loss"), float(sum(row.size for row in rows))
        return {"train_loss": loss_value, **told, "tokens": tokens}

    def measure(self, tuned: Tuned, rows: Sequence[PreferenceRow]) -> dict[str, float]:
        total = torch.zeros(len(METRICS))
        with torch.no_grad(), tuned.active():
            for chunk in chunks(rows, tuned.tokens):
                total += self._read(tuned.view, chunk)[1]
        means = (total / len(rows)).tolist()
        return {f"valid_{name}": value for name, value in zip(METRICS, means, strict=True)}

    def _read(self, view: ModelView, rows: Sequence[PreferenceRow]) -> tuple[Tensor, Tensor]:
        """The summed loss of pairs, and the sums of ``METRICS``."""
        sums = _sums(view, rows)
        reference = torch.tensor([row.reference for row in rows], device=sums.device)
        rewards = self.beta * (sums - reference)
        margins = rewards[:, 0] - rewards[:, 1]
        losses = -(1 - self.label_smoothing) * logsigmoid(margins)
        losses = losses - self.label_smoothing * logsigmoid(-margins)
        lengths = torch.tensor([len(row.chosen.learnt) for row in rows], device=sums.device)
        losses = losses - self.sft_weight * sums[:, 0] / lengths
        told = [losses, *rewards.T, margins, (margins > 0).to(sums.dtype), *sums.T]
        return losses.sum(), torch.stack(told).detach().sum(1).cpu()


def _sums(view: ModelView, rows: Sequence[PreferenceRow]) -> Tensor:
    """log π of each pair's chosen and rejected answer: [n, 2]."""
    texts = [text for row in rows for text in (row.chosen, row.rejected)]
    return torch.stack([found.sum() for found in log_probabilities(view, texts)]).view(-1, 2)
