"""Training of an adapter, on flat rows without padding.

A step takes a batch of examples in an order that its epoch's seed gives, in flat rows of at most
``tokens`` tokens, one after the other, so that memory is that of one row; what it minimises is an
objective. AdamW with a linear warm-up and decay.

All that a step depends on is in ``State``: a run that is broken off and goes on from it ends with
the same numbers to the bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from editing.deltas import Delta
from editing.finetune.adapter import Adapter
from editing.finetune.hyperparameters import TuningHyperparameters
from editing.finetune.memory import LONGEST, Plan
from editing.finetune.objectives.objective import Objective, Tuned
from editing.finetune.objectives.supervised import Supervised
from editing.models.view import ModelView
from registry.errors import JobFailed
from registry.manifests import Progress


@dataclass(frozen=True)
class Schedule:
    """How long is trained, and how.

    Attributes:
        tokens: most of one flat row; a longer example is a row of its own.
        kept: most of one flat row of texts to keep; a longer one is cut.
        checkpointing: whether layers compute again what gradients need.
        warmup: share of the steps in which the rate rises from 0.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.0
    warmup: float = 0.03
    clip: float = 1.0
    tokens: int = 4096
    checkpointing: bool = False
    seed: int = 0
    kept: int = LONGEST

    @classmethod
    def of(cls, chosen: TuningHyperparameters, planned: Plan, seed: int) -> Schedule:
        """Of settled hyperparameters."""
        return cls(
            epochs=int(chosen.n_epochs),
            batch_size=int(chosen.batch_size),
            learning_rate=float(chosen.learning_rate or 0),
            weight_decay=chosen.weight_decay,
            warmup=chosen.warmup,
            tokens=planned.tokens,
            checkpointing=planned.checkpointing,
            seed=seed,
            kept=planned.kept,
        )

    def steps(self, examples: int) -> int:
        """Of the whole run."""
        return self.epochs * -(-examples // self.batch_size)

    def rate(self, step: int, total: int) -> float:
        """The share of the learning rate that a step has."""
        rising = max(1, round(self.warmup * total))
        return min((step + 1) / rising, (total - step) / max(1, total - rising), 1.0)

    def batch(self, step: int, examples: int) -> list[int]:
        """Which examples a step takes."""
        each = -(-examples // self.batch_size)
        epoch, place = divmod(step, each)
        source = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(examples, generator=source).tolist()
        return order[place * self.batch_size : (place + 1) * self.batch_size]


@dataclass(frozen=True)
class State:
    """Where a run stands after ``step`` steps: the adapter's and the optimiser's tensors."""

    step: int
    tensors: Mapping[str, Tensor]

    def to_bytes(self) -> bytes:
        return save_tensors(
            {name: tensor.contiguous() for name, tensor in self.tensors.items()},
            {"step": json.dumps(self.step)},
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> State:
        (length,) = (int.from_bytes(data[:8], "little"),)
        header = json.loads(data[8 : 8 + length])
        return cls(json.loads(header["__metadata__"]["step"]), load_tensors(data))


class Trainer:
    """One run: an adapter, its optimiser and where they stand.

    Args:
        rows: as the objective made them.
        state: where an earlier run of the same adapter, rows and schedule stood.
        objective: what is minimised; by default the NLL of examples.
    """

    def __init__(
        self,
        view: ModelView,
        adapter: Adapter,
        rows: Sequence[Any],
        schedule: Schedule,
        state: State | None = None,
        objective: Objective[Any] | None = None,
    ) -> None:
        self.view, self.adapter, self.rows, self.schedule = view, adapter, rows, schedule
        self.objective = objective or Supervised()
        self._tuned = Tuned(
            view, adapter, schedule.tokens, schedule.checkpointing, kept=schedule.kept
        )
        self.total = schedule.steps(len(rows))
        self.step = 0
        self._named = {n: p for n, p in adapter.named_parameters() if p.requires_grad}
        steady = {id(p) for p in adapter.steady()}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self._named.values() if id(p) not in steady]},
            {"params": [p for p in self._named.values() if id(p) in steady], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            groups, lr=schedule.learning_rate, weight_decay=schedule.weight_decay
        )
        if state is not None:
            self._restore(state)

    def run(self, until: int | None = None) -> Generator[Progress, None, None]:
        """Train up to a step, by default to the end; yields every step's metrics.

        Raises:
            JobFailed: the loss or its gradient is not finite.
        """
        while self.step < (self.total if until is None else min(until, self.total)):
            yield self._step()

    def measure(self, rows: Sequence[Any]) -> dict[str, float]:
        """The objective's metrics of other rows, as it made them."""
        return self.objective.measure(self._tuned, rows)

    def delta(self, method: str) -> Delta:
        """What the adapter stands for now."""
        with torch.no_grad():
            effects = {path: e.compact() for path, e in self.adapter.effects().items()}
        return Delta(effects, self.view.base.digest, method)

    def state(self) -> State:
        tensors = {f"adapter/{name}": t.cpu() for name, t in self._kept().items()}
        for name, parameter in self._named.items():
            for key, value in self._adamw.state.get(parameter, {}).items():
                tensors[f"adamw/{name}/{key}"] = value.detach().cpu()
        return State(self.step, {name: tensor.clone() for name, tensor in tensors.items()})

    def _restore(self, state: State) -> None:
        self.step = state.step
        with torch.no_grad():
            for name, tensor in self._kept().items():
                tensor.copy_(state.tensors[f"adapter/{name}"])
        for name, parameter in self._named.items():
            found = {
                key.rpartition("/")[2]: tensor.clone().to(
                    "cpu" if key.endswith("/step") else parameter.device
                )
                for key, tensor in state.tensors.items()
                if key.rpartition("/")[0] == f"adamw/{name}"
            }
            if found:
                self._adamw.state[parameter] = found

    def _kept(self) -> dict[str, Tensor]:
        """What of the adapter a run changes: its parameters and buffers."""
        return {**{n: p.detach() for n, p in self._named.items()}, **self.adapter.kept()}

    def _step(self) -> Progress:
        step, schedule = self.step, self.schedule
        rate = schedule.learning_rate * schedule.rate(step, self.total)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.zero_grad()
        self.adapter.before_step(step, self.total)
        batch = [self.rows[i] for i in schedule.batch(step, len(self.rows))]
        with self._tuned.holding() as tuned:
            told = self.objective.backward(tuned, batch, schedule.seed * 1_000_003 + step)
        penalty = self.adapter.penalty()
        if isinstance(penalty, Tensor):
            torch.autograd.backward(penalty)
        _check_finite("loss", told["train_loss"], step)
        self.adapter.after_backward(step, self.total)
        norm = torch.nn.utils.clip_grad_norm_(self._named.values(), schedule.clip)
        _check_finite("loss's gradient", float(norm), step)
        self._adamw.step()
        self.adapter.after_step()
        self.step += 1
        return Progress(
            self.step,
            self.total,
            f"step {self.step}: loss {told['train_loss']:.4f}",
            {**told, "learning_rate": rate, "gradient_norm": float(norm)},
        )


def _check_finite(name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise JobFailed(
            f"the {name} is not finite at step {step + 1}; lower hyperparameters.learning_rate"
        )
