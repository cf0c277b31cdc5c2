"""Drive a runner without an engine: random sequences, step by step, and the plain oracle.

The runner stands where ``ERRATA_DEVICE`` says, on a GPU if there is one; the oracle on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from editing.deltas import Effect
from editing.models.loading import device_of
from registry.settings import Settings
from serving.blocks import blocks_for
from serving.plan import Segment, StepPlan
from serving.runner import Runner

Effects = Mapping[str, Effect]
DEVICE = device_of(Settings().device)


def placed(effects: Mapping[str, Effects], device: torch.device = DEVICE) -> dict[str, Effects]:
    """Versions' effects on a device."""
    return {
        version: {path: effect.map(lambda part: part.to(device)) for path, effect in own.items()}
        for version, own in effects.items()
    }


@dataclass(frozen=True)
class Script:
    """A sequence's tokens and how many of them each step computes (0: none)."""

    version: str
    tokens: tuple[int, ...]
    counts: tuple[int, ...]


def random_script(seed: int, version: str, *counts: int, vocabulary: int) -> Script:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocabulary, (sum(counts),), generator=generator)
    return Script(version, tuple(tokens.tolist()), counts)


def packed_logits(
    runner: Runner,
    scripts: Mapping[str, Script],
    effects: Mapping[str, Effects],
    blocks: Iterable[int] | None = None,
) -> dict[tuple[str, int], Tensor]:
    """Logits by sequence and number of tokens before them, all sequences in the same steps.

    They are on the CPU.

    Sequences take their blocks from ``blocks`` in turn: from the first on, where not given.
    """
    effects = placed(effects, runner.device)
    free = iter(count() if blocks is None else blocks)
    tables = {
        key: tuple(islice(free, blocks_for(len(script.tokens)))) for key, script in scripts.items()
    }
    found: dict[tuple[str, int], Tensor] = {}
    for step in range(max(len(script.counts) for script in scripts.values())):
        segments = []
        for key, script in sorted(scripts.items(), key=lambda item: item[1].version):
            start = sum(script.counts[:step])
            part = script.tokens[start : start + script.counts[step]]
            if part:
                own = tables[key][: blocks_for(start + len(part))]
                segments.append(Segment(key, 0, script.version, part, start, own, 1))
        if segments:
            logits = runner.logits(StepPlan(tuple(segments)), effects)
            for segment, row in zip(segments, logits, strict=True):
                found[str(segment.key), segment.end] = row.cpu()
    return found


@torch.inference_mode()
def plain_logits(model: PreTrainedModel, tokens: Sequence[int], effects: Effects) -> Tensor:
    """[tokens, vocabulary] by the model's own forward, effects applied one module at a time."""
    model.set_attn_implementation("eager")
    with _hooked(model, effects):
        output = model(input_ids=torch.tensor([list(tokens)]), use_cache=False)
    return output.logits[0].float()


@contextmanager
def _hooked(model: PreTrainedModel, effects: Effects) -> Iterator[None]:
    def hook(effect: Effect) -> object:
        def changed(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0]
            if isinstance(module, nn.Embedding):
                x = nn.functional.one_hot(x, module.num_embeddings).to(output.dtype)
            return effect.apply(x, output)

        return changed

    handles = [
        model.get_submodule(path).register_forward_hook(hook(effect))  # type: ignore[arg-type]
        for path, effect in effects.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
