"""Start-up checks of a base: is the packed step the model's own forward, and batch-invariant?

Some families ignore what the packed step relies on and answer wrongly without any error, so every
base is tried before it serves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from registry.errors import UnsupportedModel
from serving.attention import NAME
from serving.blocks import blocks_for
from serving.plan import Segment, StepPlan
from serving.runner import Runner

#: Largest difference from the plain forward, as a part of the largest logit.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
#: Tokens of each random sequence that each step computes.
_STEPS = (
    (3, 4, 0, 0, 40, 2, 5, 1),
    (1, 6, 17, 1, 1, 1, 1, 1),
    (1, 1, 1, 1, 1, 1, 1, 1),
    (1, 1, 1, 0, 1, 1, 1, 1),
)
_BASE = "self-test"

Place = tuple[int, int]  # sequence, tokens before the logits


def check_base(name: str, runner: Runner) -> bool:
    """Compare packed steps with the plain forward, and with the same steps alone.

    Returns:
        Whether the step is batch-invariant, as every logit having the same bits alone shows.

    Raises:
        UnsupportedModel: the packed logits are not the model's.
    """
    lengths = [sum(counts) for counts in zip(*_STEPS, strict=True)]
    if sum(map(blocks_for, lengths)) > runner.kv_blocks:
        raise UnsupportedModel(
            f"base {name!r}: ERRATA_KV_BYTES holds {runner.kv_blocks} blocks of keys and values,"
            " too few for anything; raise it"
        )
    generator = torch.Generator().manual_seed(0)
    vocabulary = runner.model.config.vocab_size
    tokens = [
        torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths
    ]
    everyone = range(len(tokens))
    try:
        together = _packed(runner, tokens, everyone)
    except Exception as error:  # a model may fail in any way that its author did not think of
        raise _refused(name, runner, str(error)) from error
    for sequence, plain in enumerate(_plain(runner, tokens)):
        for (own, length), logits in together.items():
            if own == sequence:
                _compare(name, runner, logits, plain[length - 1])
    if not runner.batch_invariant:
        return False
    alone = {
        place: logits
        for sequence in everyone
        for place, logits in _packed(runner, tokens, [sequence]).items()
    }
    return all(torch.equal(logits, alone[place]) for place, logits in together.items())


def _compare(name: str, runner: Runner, packed: Tensor, plain: Tensor) -> None:
    scale = max(1.0, float(plain.abs().max()))
    difference = float((packed - plain).abs().max())
    if not difference <= TOLERANCE[runner.model.dtype] * scale:
        raise _refused(
            name, runner, f"a logit differs by {difference:.3g} from the model's own forward"
        )


def _refused(name: str, runner: Runner, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"base {name!r}: family {runner.model.config.model_type!r} cannot be served in packed"
        f" steps: {reason}"
    )


def _packed(
    runner: Runner, tokens: Sequence[Sequence[int]], chosen: Sequence[int]
) -> Mapping[Place, Tensor]:
    """Logits [vocabulary] after each segment of the chosen sequences, step by step."""
    tables: list[tuple[int, ...]] = []
    used = 0
    for sequence in chosen:
        count = blocks_for(len(tokens[sequence]))
        tables.append(tuple(range(used, used + count)))
        used += count
    done = dict.fromkeys(chosen, 0)
    found: dict[Place, Tensor] = {}
    for counts in _STEPS:
        segments = []
        for blocks, sequence in zip(tables, chosen, strict=True):
            start, count = done[sequence], counts[sequence]
            if count:
                part = tuple(tokens[sequence][start : start + count])
                own = blocks[: blocks_for(start + count)]
                segments.append(Segment(sequence, 0, _BASE, part, start, own, 1))
            done[sequence] += count
        if segments:
            logits = runner.logits(StepPlan(tuple(segments)), {_BASE: {}})
            for segment, row in zip(segments, logits, strict=True):
                found[segment.key, done[segment.key]] = row  # type: ignore[index]
    return found


@torch.inference_mode()
def _plain(runner: Runner, tokens: Sequence[Sequence[int]]) -> list[Tensor]:
    """The model's own logits [tokens, vocabulary] of each sequence alone."""
    model = runner.model
    model.set_attn_implementation("eager")
    try:
        return [
            model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
            .logits[0]
            .float()
            for ids in tokens
        ]
    finally:
        model.set_attn_implementation(NAME)
