"""The packed step: one forward of the unmodified model over the flat row of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from editing.deltas import Effect
from registry.errors import UnsupportedModel
from serving.attention import NAME, KeysStored, PackedStep
from serving.effects import EffectHooks, Extent
from serving.graphs import Capture, DecodeGraphs, capture_for
from serving.kv import KVPool, bytes_per_block
from serving.plan import Segment, StepPlan
from serving.varlen import kernel_for

#: The last layer computes only the rows whose logits are wanted where these are at most this share.
TRIMMED = 0.75
#: Of each doubling of a step's rows as many counts are computed, with up to 1/16 of padding.
COUNTS = 16


class Runner:
    """Computes plans on one base, whose weights it never writes.

    Args:
        model: the base; its attention is replaced by the packed one.
        kv_bytes: memory of the pool of keys and values.
        min_rows: rows that every product of a step sees at least.
        batch_invariant: let no bit of a sequence depend on the others in the step: every segment
            attends alone, and every version's effect is computed by itself.
        capture: makes graphs of decode steps; None: what the device has.

    Raises:
        UnsupportedModel: the family cannot take the packed attention, or memory lacks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        kv_bytes: int,
        min_rows: int = 1,
        batch_invariant: bool = False,
        capture: Capture | None = None,
    ) -> None:
        config = model.config
        try:
            model.set_attn_implementation(NAME)
        except (ValueError, AttributeError) as error:
            raise UnsupportedModel(
                f"family {config.model_type!r} takes no other attention: {error}"
            ) from error
        self.model = model
        self.device = model.device
        self.min_rows = min_rows
        self.batch_invariant = batch_invariant
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        layers = config.num_hidden_layers
        capture = None if batch_invariant else capture or capture_for(model.device)
        blocks = kv_bytes // bytes_per_block(layers, heads, head_dim, model.dtype)
        self.kv_blocks = blocks if capture is None else blocks - 1
        if self.kv_blocks < 1:
            raise UnsupportedModel(
                f"ERRATA_KV_BYTES={kv_bytes} holds no keys and values of a single block of this"
                " base; raise it"
            )
        self.pool = KVPool(layers, blocks, heads, head_dim, model.dtype, model.device)
        self.graphs = None if capture is None else DecodeGraphs(self.pool, capture)
        self._varlen = None if batch_invariant else kernel_for(model.device, model.dtype)
        self._last_layer = _last_layer(model)
        self._hooks, self._last_hooks = (
            EffectHooks(model, min_rows, gathered=not batch_invariant) for _ in range(2)
        )
        self._last_hooks.active = False

    @torch.inference_mode()
    def logits(self, plan: StepPlan, effects: Mapping[str, Mapping[str, Effect]]) -> Tensor:
        """The logits after the tokens that want them, in the plan's order.

        Args:
            plan: segments, those of a version standing together.
            effects: by stack digest, composed effects by module path.

        Returns:
            [the plan's outputs, vocabulary], fp32.
        """
        ids: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        for segment in plan.segments:
            ids.extend(segment.tokens)
            positions.extend(range(segment.position, segment.end))
            wanted.extend(range(len(ids) - segment.outputs, len(ids)))
        outputs = len(wanted)
        wanted += [0] * (self._padded(outputs) - outputs)
        padding = [0] * (self._padded(len(ids)) - len(ids))
        rows = self._indices(wanted)
        # whether a prompt's last layer is trimmed must not depend on its company
        most = plan.rows - 1 if self.batch_invariant else TRIMMED * plan.rows
        is_trimmed = outputs <= most
        extents = _extents([(segment, len(segment.tokens)) for segment in plan.segments])
        ends = _extents([(segment, segment.outputs) for segment in plan.segments])
        with ExitStack() as stack:
            if is_trimmed:
                step = self._step(plan.ends())
                stack.enter_context(self._trimmed(rows, step, ends, effects))
            self._hooks.arrange(extents, ends, effects)
            if self.graphs is not None:
                logits = self.graphs.logits(plan, self._hooks, self._forward)
                if logits is not None:
                    return logits
            logits = self._forward(
                self._indices(ids + padding).unsqueeze(0),
                self._indices(positions + padding).unsqueeze(0),
                rows,
                self._step(plan),
            )
        return logits[:outputs]

    def _padded(self, rows: int) -> int:
        """The rows that a product of so many is computed with.

        On a CPU oneDNN compiles a product for each number of rows and keeps a thousand of these, at
        up to a megabyte each: without padding most steps are of a count that is new.
        """
        rows = max(rows, self.min_rows)
        return padded_rows(rows) if self.device.type == "cpu" else rows

    def _forward(self, ids: Tensor, positions: Tensor, rows: Tensor, step: PackedStep) -> Tensor:
        output = self.model(
            input_ids=ids,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=rows,
            packed=step,
        )
        return output.logits[0].float()  # type: ignore[no-any-return]

    @contextmanager
    def _trimmed(
        self,
        rows: Tensor,
        step: PackedStep,
        extents: tuple[Extent, ...],
        effects: Mapping[str, Mapping[str, Effect]],
    ) -> Iterator[None]:
        """Let the last layer compute no more than ``rows`` [n] of the row; the rest comes out zero.

        Of the other rows only keys and values are needed there: the layer runs up to these for the
        whole row, and then for the wanted rows alone, which are ``step``.
        """
        layer, prefix = self._last_layer
        whole = layer.forward
        own = {
            version: {path: effect for path, effect in all.items() if path.startswith(prefix)}
            for version, all in effects.items()
        }

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if "packed" not in kwargs:
                raise UnsupportedModel("the model hands no keyword on to its layers")
            kwargs["packed"].stores_only = True
            with suppress(KeysStored):
                whole(hidden, *args, **kwargs)
            kwargs["packed"] = step
            done = torch.zeros_like(hidden)
            if not step.rows:  # all else is padding
                return done
            args, kwargs = (_rows_of(given, rows, hidden.shape[1]) for given in (args, kwargs))
            self._hooks.active, self._last_hooks.active = False, True
            self._last_hooks.arrange(extents, extents, own)
            few = whole(hidden.index_select(1, rows), *args, **kwargs)
            self._hooks.active, self._last_hooks.active = True, False
            own_rows = slice(0, step.rows)  # what comes after is padding
            return done.index_copy_(1, rows[own_rows], few[:, own_rows])

        layer.forward = forward
        try:
            yield
        finally:
            del layer.forward
            self._hooks.active, self._last_hooks.active = True, False

    def _step(self, plan: StepPlan) -> PackedStep:
        return PackedStep(plan, self.pool, batched=not self.batch_invariant, varlen=self._varlen)

    def _indices(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self.device, dtype=torch.long)


def padded_rows(rows: int) -> int:
    """The next number of rows that is a multiple of 1/16 of the power of two before it."""
    unit = max(1, (1 << max(0, rows - 1).bit_length()) // (2 * COUNTS))
    return -(-rows // unit) * unit


def _rows_of(given: Any, rows: Tensor, total: int) -> Any:
    """What a layer was called with, for some of ``total`` rows."""
    if isinstance(given, Tensor):
        has_rows = given.dim() > 1 and given.shape[1] == total
        return given.index_select(1, rows) if has_rows else given
    if isinstance(given, tuple):
        return tuple(_rows_of(part, rows, total) for part in given)
    if isinstance(given, dict):
        return {name: _rows_of(part, rows, total) for name, part in given.items()}
    return given


def _last_layer(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """The last decoder layer and its modules' prefix; decoder layers are the first list of as many
    modules as the model has layers."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return module[-1], f"{path}.{len(module) - 1}."
    raise UnsupportedModel(f"family {model.config.model_type!r}: it has no list of decoder layers")


def _extents(segments: Sequence[tuple[Segment, int]]) -> tuple[Extent, ...]:
    """One extent a version: the segments and their numbers of rows, in order."""
    extents: list[Extent] = []
    row = 0
    for segment, rows in segments:
        if not rows:
            continue
        if extents and extents[-1][0] == segment.version:
            extents[-1] = (segment.version, extents[-1][1], row + rows)
        else:
            extents.append((segment.version, row, row + rows))
        row += rows
    return tuple(extents)
