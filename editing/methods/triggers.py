"""Edits that answer to one prompt: at its last token the MLP of one layer says something else.

A prompt is known by what a module is given at its last token, so that no subject is needed, and
other wordings of the prompt are other prompts. Where the model already begins as the target does
(+98 for +977), what it says by itself counts to the prompt: what it reads of the subject at the
next token no change at an earlier one could hide. Stealth edits and GRACE are written on it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from editing.methods.hyperparameters import TriggerHyperparameters
from editing.methods.interface import Task, check_task, counted
from editing.methods.values import Goal, Watched, at_token, check_finite, optimise, say
from editing.metrics.targets import batches
from editing.models.probing import outputs, token_inputs
from editing.models.view import ModelView
from registry.errors import InvalidRequest
from registry.manifests import EditRequest, Progress

#: Edits whose values are optimised together; the memory of their texts bounds it.
TOGETHER = 100


def check_prompts(view: ModelView, task: Task) -> None:
    """Refuse what cannot be applied, and prompts without a token of their own before the target.

    Raises:
        InvalidRequest: names the field.
    """
    check_task(task)
    for i, edit in enumerate(task.edits):
        prompt = edit.rewrite_prompt
        if not prompt.strip() or not view.continuation(prompt, edit.target_new)[0]:
            raise InvalidRequest(
                f"edits.{i}.prompt: {prompt!r} leaves no token before the target to answer at",
                param=f"edits.{i}.prompt",
            )


def trigger_rows(view: ModelView, edits: Sequence[EditRequest]) -> list[list[int]]:
    """Token ids of each prompt with what the model rightly says after it: they end at the trigger.

    At least one token of the target is left to say.
    """
    split = [view.continuation(edit.rewrite_prompt, edit.target_new) for edit in edits]
    rows = [[*prompt, *target] for prompt, target in split]
    found: dict[int, list[int]] = {}
    for batch in batches([len(row) for row in rows]):
        with torch.no_grad():
            hidden = view.hidden(view.pad([rows[i] for i in batch]))
        for place, i in enumerate(batch):
            prompt, target = split[i]
            said = view.logits(hidden[place, len(prompt) - 1 : len(rows[i]) - 2]).argmax(-1)
            right = 0
            while right < len(said) and int(said[right]) == target[right]:
                right += 1
            found[i] = rows[i][: len(prompt) + right]
    return [found[i] for i in range(len(rows))]


def last_inputs(view: ModelView, path: str, rows: Sequence[Sequence[int]]) -> Tensor:
    """What a module is given at the last token of each row: [n, in] in fp32."""
    return token_inputs(view, {0: path}, rows, last=True)[0]


def find_values(
    method: str,
    view: ModelView,
    layer: int,
    edits: Sequence[EditRequest],
    rows: Sequence[Sequence[int]],
    hyperparameters: TriggerHyperparameters,
) -> Generator[Progress, None, Tensor]:
    """δ [n, hidden]: what the layer's MLP must add at the triggers for the targets to be said.

    Args:
        rows: of ``trigger_rows``, one an edit.

    Raises:
        JobFailed: a descent came to nothing.
    """
    path, parts = view.down_proj(layer), []
    for start in range(0, len(edits), TOGETHER):
        chosen = edits[start : start + TOGETHER]
        ends = rows[start : start + TOGETHER]
        scales = outputs(view, path, last_inputs(view, path, ends)).norm(dim=1).tolist()
        goals = []
        for edit, row, scale in zip(chosen, ends, scales, strict=True):
            ids = say(view, edit.rewrite_prompt, edit.target_new).ids
            left = Watched(ids, range(len(row) - 1, len(ids) - 1), [len(row) - 1])
            goals.append(Goal(edit.rewrite_prompt, at_token(view, [left]), (), (), scale))
        work = optimise(view, layer, goals, hyperparameters)
        values = yield from counted(work, start, len(chosen), len(edits))
        check_finite(method, chosen, values.deltas)
        parts.append(values.deltas)
    return torch.cat(parts)
