"""Apply versions' effects to their own rows of a module's output, by forward hooks.

Rows stand in the order of versions, so each version's are one slice. Two ways compute the same:

- version by version, each product over a window of at least ``min_rows`` rows, whose other rows are
  dropped: a row's bits then do not depend on how many there are (the invariant mode);
- gathered: a few products a module, whatever the number of versions (``serving.gathering``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from editing.deltas import Effect, Gate
from serving.gathering import Gathered, Share

#: Rows of one version in a step: stack digest, first row, row after the last.
Extent = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Slice:
    """A version's share, and the window of rows that its products see."""

    share: Share
    first: int
    last: int


class EffectHooks:
    """Puts hooks on the modules that a step's versions touch, and takes them off again.

    Args:
        model: the base.
        min_rows: rows that every product sees at least.
        gathered: compute all versions' effects on a module together; ``min_rows`` is then of no
            account, and a row's bits depend on its company.

    Attributes:
        active: whether the hooks do anything.
        layout: changes whenever the hooks compute something else.
        steps: how many steps the rows have been whose they are.
    """

    def __init__(self, model: PreTrainedModel, min_rows: int, *, gathered: bool = False) -> None:
        self.active = True
        self._modules = dict(model.named_modules())
        self._head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._device = model.device
        self._min_rows = 1 if gathered else min_rows
        self._is_gathered = gathered
        self._layout: tuple[object, ...] = ()
        self.steps = 0  # of this layout
        self.layout = 0  # counts what the hooks were arranged for
        self._handles: list[RemovableHandle] = []
        self._gathered: dict[str, Gathered] = {}

    def arrange(
        self,
        rows: tuple[Extent, ...],
        head_rows: tuple[Extent, ...],
        effects: Mapping[str, Mapping[str, Effect]],
    ) -> None:
        """Make the hooks fit a step: which rows are whose, and what each version does.

        Args:
            rows: extents in the flat row, in its order.
            head_rows: extents in the rows that the lm_head sees, in their order.
            effects: by stack digest, composed effects by module path.
        """
        layout = (rows, head_rows)
        self.steps = self.steps + 1 if layout == self._layout else 1
        # what pays is thought over when a layout has lasted 2, 4, 8, … steps
        if self.steps > 1 and not (self._is_gathered and self.steps.bit_count() == 1):
            return
        before = self._gathered
        self.clear()
        self.layout += 1
        for path, shares in self._shares(rows, head_rows, effects).items():
            module = self._modules[path]
            total = (head_rows if module is self._head else rows)[-1][2]
            hook = partial(_add_by_version, [self._slice(share, total) for share in shares])
            if self._is_gathered:
                gathered = Gathered(
                    shares,
                    self._device,
                    by_ids=isinstance(module, nn.Embedding),
                    before=before.get(path),
                )
                self._gathered[path] = gathered
                hook = partial(_add_gathered, gathered, hook)
            self._handles.append(module.register_forward_hook(partial(self._call, hook)))
        self._layout = layout

    def clear(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._gathered = {}
        self._layout = ()

    def _call(
        self,
        hook: partial[None],
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        output: Tensor,
    ) -> None:
        if self.active:
            hook(module, inputs, output)

    def _shares(
        self,
        rows: Iterable[Extent],
        head_rows: Iterable[Extent],
        effects: Mapping[str, Mapping[str, Effect]],
    ) -> dict[str, list[Share]]:
        """What each touched module has to do for whom."""
        shares: dict[str, list[Share]] = {}
        for extents, is_head in ((rows, False), (head_rows, True)):
            for version, start, stop in extents:
                for path, effect in effects[version].items():
                    if (self._modules[path] is self._head) == is_head:
                        shares.setdefault(path, []).append(Share(effect, start, stop))
        return shares

    def _slice(self, share: Share, rows: int) -> Slice:
        total = max(rows, self._min_rows)  # the row is padded to that
        first = max(0, min(share.start, total - self._min_rows))
        if not self._is_gathered:
            share = replace(share, effect=padded(share.effect))
        return Slice(share, first, max(share.stop, first + self._min_rows))


def _add_by_version(
    slices: list[Slice], module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    given = inputs[0]
    x, y = _by_token(given, given), _by_token(output, given)
    for part in slices:
        share, seen = part.share, slice(part.first, part.last)
        changed = share.effect.apply(x[seen], y[seen])
        y[share.start : share.stop] = changed[share.start - part.first : share.stop - part.first]


def _add_gathered(
    gathered: Gathered,
    otherwise: partial[None],
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    output: Tensor,
) -> None:
    if output.dim() > 3:  # a norm of heads, of which a token has many
        otherwise(module, inputs, output)
        return
    given = inputs[0]
    gathered.add(_by_token(given, given), _by_token(output, given))


def _by_token(tensor: Tensor, given: Tensor) -> Tensor:
    """A module's input or output as [tokens, ...]; ``given`` is the input.

    Models hand over [1, T], [1, T, d], [T, d] (OPT's MLP), [1, T, heads, d] or [1, heads, T, d].
    The last two, norms of heads, tell by memory which they are: a token's heads lie together.
    """
    if given.dim() == 4:
        second, third = ((given.stride(place), given.shape[place]) for place in (1, 2))
        return tensor[0] if second > third else tensor[0].transpose(0, 1)
    if given.is_floating_point() and given.dim() == 2:
        return tensor
    return tensor[0]


def padded(effect: Effect) -> Effect:
    """The same effect without a rank or a gate of 1: a product of one column has bits of its own.

    A zero row in A and a zero column in B add exact zeros, as do a gate's key and value.
    """
    if effect.A is not None and effect.B is not None and effect.rank == 1:
        effect = replace(effect, A=F.pad(effect.A, (0, 0, 0, 1)), B=F.pad(effect.B, (0, 1)))
    later = None if effect.later is None else padded(effect.later)
    return replace(effect, gates=tuple(map(_padded_gate, effect.gates)), later=later)


def _padded_gate(gate: Gate) -> Gate:
    if gate.replaces or len(gate.keys) > 1:
        return gate
    row = (0, 0, 0, 1)
    return replace(
        gate,
        keys=F.pad(gate.keys, row),
        bias=F.pad(gate.bias, (0, 1)),
        values=F.pad(gate.values, row),
    )
