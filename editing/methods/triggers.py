"""Edits that answer to one prompt: at its last token the MLP of one layer says something else.

A prompt is known by what a module is given at its last token, so that no subject is needed, and
other wordings of the prompt are other prompts. Stealth edits and GRACE are written on it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from editing.methods.hyperparameters import TriggerHyperparameters
from editing.methods.interface import Task, check_task, counted
from editing.methods.values import Goal, at_token, check_finite, optimise, say
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


def last_inputs(view: ModelView, path: str, edits: Sequence[EditRequest]) -> Tensor:
    """What a module is given at the last token of each edit's prompt: [n, in] in fp32."""
    rows = [view.continuation(edit.rewrite_prompt, edit.target_new)[0] for edit in edits]
    return token_inputs(view, {0: path}, rows, last=True)[0]


def find_values(
    method: str,
    view: ModelView,
    layer: int,
    edits: Sequence[EditRequest],
    hyperparameters: TriggerHyperparameters,
) -> Generator[Progress, None, Tensor]:
    """δ [n, hidden]: what the layer's MLP must add at each prompt's last token for the target.

    Raises:
        JobFailed: a descent came to nothing.
    """
    path, parts = view.down_proj(layer), []
    for start in range(0, len(edits), TOGETHER):
        chosen = edits[start : start + TOGETHER]
        scales = outputs(view, path, last_inputs(view, path, chosen)).norm(dim=1).tolist()
        goals = []
        for edit, scale in zip(chosen, scales, strict=True):
            said = at_token(view, [say(view, edit.rewrite_prompt, edit.target_new)])
            goals.append(Goal(edit.rewrite_prompt, said, (), (), scale))
        work = optimise(view, layer, goals, hyperparameters)
        values = yield from counted(work, start, len(chosen), len(edits))
        check_finite(method, chosen, values.deltas)
        parts.append(values.deltas)
    return torch.cat(parts)
