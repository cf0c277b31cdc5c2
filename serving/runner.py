"""The packed step: one forward of the unmodified model over the flat row of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from editing.deltas import Effect
from registry.errors import UnsupportedModel
from serving.attention import NAME, PackedStep
from serving.effects import EffectHooks, Extent
from serving.kv import KVPool
from serving.plan import Segment, StepPlan


class Runner:
    """Computes plans on one base, whose weights it never writes.

    Args:
        model: the base; its attention is replaced by the packed one.
        slots: tokens whose keys and values the pool holds.
        min_rows: rows that every product of a step sees at least.

    Raises:
        UnsupportedModel: the family cannot take the packed attention, or memory lacks.
    """

    def __init__(self, model: PreTrainedModel, slots: int, min_rows: int) -> None:
        config = model.config
        try:
            model.set_attn_implementation(NAME)
        except (ValueError, AttributeError) as error:
            raise UnsupportedModel(
                f"family {config.model_type!r} takes no other attention: {error}"
            ) from error
        self.model = model
        self.min_rows = min_rows
        self.pool = KVPool(
            layers=config.num_hidden_layers,
            slots=slots,
            heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None)
            or config.hidden_size // config.num_attention_heads,
            dtype=model.dtype,
        )
        self._hooks = EffectHooks(model, min_rows)

    @torch.inference_mode()
    def logits(self, plan: StepPlan, effects: Mapping[str, Mapping[str, Effect]]) -> Tensor:
        """The logits after each sampling segment, in the plan's order.

        Args:
            plan: segments, those of a version standing together.
            effects: by stack digest, composed effects by module path.

        Returns:
            [sampling segments, vocabulary], fp32.
        """
        packed = PackedStep(plan, self.pool)
        ids: list[int] = []
        positions: list[int] = []
        ends: list[int] = []
        for segment in plan.segments:
            ids.extend(segment.tokens)
            positions.extend(range(segment.position, segment.position + len(segment.tokens)))
            if segment.samples:
                ends.append(len(ids) - 1)
        padding = [0] * max(0, self.min_rows - len(ids))
        sampled = len(ends)
        ends += [0] * max(0, self.min_rows - sampled)
        self._hooks.arrange(
            _extents([(segment, len(segment.tokens)) for segment in plan.segments]),
            _extents([(segment, 1) for segment in plan.sampling]),
            effects,
        )
        output = self.model(
            input_ids=torch.tensor([ids + padding]),
            position_ids=torch.tensor([positions + padding]),
            use_cache=False,
            logits_to_keep=torch.tensor(ends),
            packed=packed,
        )
        return output.logits[0, :sampled].float()  # type: ignore[no-any-return]


def _extents(segments: Sequence[tuple[Segment, int]]) -> tuple[Extent, ...]:
    """One extent a version: the segments and their numbers of rows, in order."""
    extents: list[Extent] = []
    row = 0
    for segment, rows in segments:
        if extents and extents[-1][0] == segment.version:
            extents[-1] = (segment.version, extents[-1][1], row + rows)
        else:
            extents.append((segment.version, row, row + rows))
        row += rows
    return tuple(extents)
