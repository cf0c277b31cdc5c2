"""What modules are given and answer with the effects on them, read off the modules themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from editing.metrics.targets import batches
from editing.models.view import ModelView

#: Rows that a module is asked of at once.
ROWS = 1024


def token_inputs(
    view: ModelView, paths: Mapping[int, str], rows: Sequence[Sequence[int]], last: bool = False
) -> dict[int, Tensor]:
    """What modules are given at every token of some rows, or at each row's last one.

    Returns [tokens, in] in fp32 by key of ``paths``, in the order of the rows.
    """
    found: dict[int, dict[int, Tensor]] = {key: {} for key in paths}
    for batch in batches([len(row) for row in rows]):
        for key, inputs in view.inputs(paths, [rows[i] for i in batch]).items():
            for place, i in enumerate(batch):
                end = len(rows[i])
                found[key][i] = inputs[place, end - 1 if last else 0 : end]
    return {key: torch.cat([parts[i] for i in range(len(rows))]) for key, parts in found.items()}


@torch.no_grad()
def outputs(view: ModelView, path: str, x: Tensor) -> Tensor:
    """What a module answers to rows [n, in]: [n, out] in fp32."""
    parts: list[Tensor] = [
        view.module(path)(part) for part in torch.split(x.to(view.model.dtype), ROWS)
    ]
    return torch.cat(parts).float()


def linear(view: ModelView, path: str) -> tuple[Tensor, Tensor]:
    """W [out, in] and bias [out] of a linear in fp32."""
    width = view.weight(path).shape[1]
    (bias,) = outputs(view, path, torch.zeros(1, width, device=view.device))
    return columns(view, path, torch.arange(width, device=view.device)).T, bias


def columns(view: ModelView, path: str, places: Tensor) -> Tensor:
    """Columns of a linear's W: [n, out] in fp32 for places [n]."""
    width = view.weight(path).shape[1]
    nothing = outputs(view, path, torch.zeros(1, width, device=view.device))
    parts = [
        outputs(view, path, torch.nn.functional.one_hot(part, width)) - nothing
        for part in torch.split(places, ROWS)
    ]
    return torch.cat(parts)
