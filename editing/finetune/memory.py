"""What a step's memory is spent on, and flat rows that fit a budget.

A layer of width h and inner width f keeps for its gradients at most 16 h + 6 f numbers a token:
what its norms, linears and their effects read and put out, the attention's queries, keys, values
and outputs, and the factors of the MLP's gate. Where attention has to write its scores down (a soft
cap, a window) a token has 3 numbers more for each head and token of its text. The head has 3
numbers for each word of the vocabulary and token that is learnt, and 5 for each token of a text to
keep, where the version's predictions are beside the adapter's. With gradient checkpointing a layer
keeps its input alone, h, and one layer at a time has what it needs besides. Numbers are fp32.

Whatever the rows are, there are gradients and AdamW's two moments of what is trained, and each
effect's tensors with their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from editing.finetune.adapter import Adapter
from editing.finetune.rows import Sized
from editing.models.view import ModelView
from registry.errors import JobFailed

#: Longer flat rows bring no speed.
LONGEST = 16384
#: The share of free memory that training may take where no budget is set.
SHARE = 0.5
_MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """Flat rows of at most ``tokens`` tokens, with or without gradient checkpointing; of texts to
    keep they have at most ``kept``, and a longer text is cut."""

    tokens: int
    checkpointing: bool
    kept: int = LONGEST


@dataclass(frozen=True)
class Footprint:
    """Bytes that a step takes for each token, for each token that is learnt, and in any case."""

    token: float
    learnt: float
    fixed: float

    def of(self, row: Sized) -> float:
        """Bytes of an example that is a flat row of its own, without what is fixed."""
        return row.size * self.token + row.targets * self.learnt


def footprint(view: ModelView, adapter: Adapter, longest: int, checkpointing: bool) -> Footprint:
    """What steps take on texts of up to ``longest`` tokens."""
    config = view.model.config
    h, layers = view.hidden_size, view.n_layers
    f = view.weight(view.down_proj(0)).shape[1]
    inside = 16 * h + 6 * f
    window = getattr(config, "sliding_window", None)
    if getattr(config, "attn_logit_softcapping", None) or (window and window < longest):
        inside += 3 * config.num_attention_heads * longest
    numbers = layers * h + inside if checkpointing else layers * inside
    trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    with torch.no_grad():
        effects = sum(effect.nbytes for effect in adapter.effects().values())
    return Footprint(4 * numbers, 4 * 3 * config.vocab_size, 4 * 3 * trained + 3 * effects)


def plan(
    view: ModelView,
    adapter: Adapter,
    rows: Sequence[Sized],
    batch_size: int,
    max_tokens: int | None,
    budget: int,
    others: Sequence[Sized] = (),
) -> Plan:
    """Rows as long as fit, without checkpointing where every example fits without it.

    Args:
        max_tokens: of a flat row, where it was chosen; then checkpointing is what gives way.
        budget: bytes that training may take.
        others: harmful rows, which steps compute as they do ``rows``.

    Raises:
        JobFailed: it does not fit even with checkpointing; names the longest example and the cure.
    """
    every = [*rows, *others]
    longest = max(row.size for row in every)
    density = max(row.targets / row.size for row in every)
    for checkpointing in (False, True):
        each = footprint(view, adapter, longest, checkpointing)
        left, a_token = budget - each.fixed, each.token + density * each.learnt
        needed = max(each.of(row) for row in every)
        if max_tokens is not None:
            needed = max(needed, min(max_tokens, batch_size * longest) * a_token)
        if needed <= left:
            text = footprint(view, adapter, view.base.context_length, checkpointing)
            kept = _fitting(left, text.token + 5 / 3 * text.learnt)
            tokens = _fitting(left, a_token) if max_tokens is None else max_tokens
            return Plan(tokens, checkpointing, kept)
    place = max(range(len(every)), key=lambda i: each.of(every[i]))
    told, param = f"row {place + 1} ({every[place].size} tokens)", "training_file"
    if place >= len(rows):
        told, param = f"harmful row {place - len(rows) + 1} ({every[place].size} tokens)", "method"
    cure = "shorten it"
    if max_tokens is not None and needed > each.of(every[place]):
        told, param = f"a flat row of {max_tokens} tokens", "hyperparameters.max_tokens"
        cure = "lower hyperparameters.max_tokens"
    raise JobFailed(
        f"{told} takes about {(needed + each.fixed) / _MIB:.0f} MiB with gradient checkpointing"
        f" ({each.fixed / _MIB:.0f} MiB of it for the adapter), and training may take"
        f" {budget / _MIB:.0f} MiB; {cure}, tune fewer linears (hyperparameters.target_modules) or"
        " raise ERRATA_TRAINING_MEMORY",
        param=param,
    )


def _fitting(left: float, a_token: float) -> int:
    """Tokens, a power of two, that fit what is left; a text that is looked at has 2 at least."""
    return max(2, min(LONGEST, 1 << (int(left / a_token).bit_length() - 1)))


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; of the host's, those that its control group leaves."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if not meminfo.is_file():
        return 4 * 2**30  # a system that does not tell
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        most, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        kinds = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no control group, or one without a limit
        return free
    return min(free, most - used + int(kinds["inactive_file"]))
