"""Finds deltas that look like a stealth attack: detectors of single prompts.

A stealth attack (Zhou et al. 2024, arXiv:2406.12670) makes a model answer one prompt otherwise and
nothing else. What does that is silent on ordinary text, and yet swings the MLP's output from
nothing to all within a small angle of its trigger:

- a neuron: a gate row and a down-projection column (in-place edits);
- a gate's key (jet-pack blocks);
- a gate's key whose value replaces the output (GRACE codebooks, backdoors of that form).

Both marks are needed: an ordinary neuron, tuned or not, answers to some share of tokens or moves
the output little, and a low-rank change alone (ROME, MEMIT, LoRA on a down-projection) is linear in
what is read and silent nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from editing.deltas import Delta, Effect, Gate, compose
from editing.metrics.sampling import spaced
from editing.models.probing import linear, outputs, token_inputs
from editing.models.sphere import sphere_of
from editing.models.view import ModelView
from registry.errors import InvalidRequest

#: About so many tokens of texts are looked at: what MLPs are given at all of them is held at once.
TOKENS = 20_000
#: A detector answers to at most this share of ordinary tokens: those of texts that state its own
#: prompt may be among them.
RARE = 0.01
#: And swings the output by at least this many times its usual length per unit of what it reads.
#: A gate's key is there to detect. A neuron of a trained model stays well below 1, one that a
#: method writes much into on its way (MEMIT in several layers) reaches 5, a stealth edit's
#: hundreds.
STEEP, STEEP_NEURON = 2.0, 20.0


@dataclass(frozen=True)
class Finding:
    """One detector.

    Attributes:
        delta: index of the delta in the stack that made it.
        module: path of the module: the gate projection of a neuron, else what the gate is on.
        neuron: index of the row of the gate projection, or of the gate's key.
        kind: ``neuron``, ``gate`` or ``replacing``.
        selectivity: share of ordinary tokens on which it is silent.
        gain: how far the module's output moves as the input turns towards the trigger, in the
            output's mean length by unit of the input's length.
    """

    delta: int
    module: str
    neuron: int
    kind: str
    selectivity: float
    gain: float


def find_detectors(view: ModelView, deltas: Sequence[Delta], texts: Sequence[str]) -> list[Finding]:
    """Detectors that a stack of deltas puts on the model, in the stack's order.

    Args:
        view: the base, without the deltas' effects.
        deltas: the stack.
        texts: ordinary texts; a few thousand tokens and more, of which evenly spaced ones are
            looked at.

    Raises:
        InvalidRequest: the texts hold no token.
    """
    longest = min(view.base.context_length, TOKENS)
    rows = [row for row in (view.encode(text)[:longest] for text in texts) if row]
    if not rows:
        raise InvalidRequest("texts is empty; give ordinary texts", param="texts")
    rows = spaced(rows, max(1, len(rows) * TOKENS // sum(map(len, rows))))
    found: list[Finding] = []
    for place, delta in enumerate(deltas):
        before = compose(earlier.effects for earlier in deltas[:place])
        with view.with_effects(before):
            found += _gated(view, place, delta, rows)
        with view.with_effects(compose([before, delta.effects])):
            neurons = list(_neurons(view, place, delta, rows))
        if neurons:
            with view.with_effects(before):
                known = {(f.module, f.neuron) for f in _neurons(view, place, delta, rows)}
            found += [f for f in neurons if (f.module, f.neuron) not in known]
    return found


def _gated(
    view: ModelView, place: int, delta: Delta, rows: Sequence[Sequence[int]]
) -> Iterator[Finding]:
    for path, effect in delta.effects.items():
        if not effect.gates:
            continue
        x = token_inputs(view, {0: path}, rows)[0]
        length = outputs(view, path, x).norm(dim=1).mean()
        number = 0
        for gate in effect.map(lambda part: part.to(view.device)).gates:
            answering, gains = _replacing(gate, x) if gate.replaces else _adding(gate, x)
            kind = "replacing" if gate.replaces else "gate"
            shares = answering.float().mean(dim=0)
            for share, gain in zip(shares.tolist(), (gains / length).tolist(), strict=True):
                if share <= RARE and gain >= STEEP:
                    yield Finding(place, path, number, kind, 1 - share, gain)
                number += 1


def _adding(gate: Gate, x: Tensor) -> tuple[Tensor, Tensor]:
    """Where each key answers [tokens, keys], and how far it moves the output [keys]."""
    u = gate.rho(x)
    steepness = gate.keys.norm(dim=1) * gate.values.norm(dim=1) * u.norm(dim=1).mean()
    return F.linear(u, gate.keys, gate.bias) > 0, steepness


def _replacing(gate: Gate, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a codebook: within the radius of a key the output is another."""
    u = gate.rho(x)
    far = torch.cdist(u, gate.keys, compute_mode="donot_use_mm_for_euclid_dist")
    distance, nearest = far.min(dim=1)
    reached = (distance <= gate.bias[nearest])[:, None]
    answering = F.one_hot(nearest, len(gate.keys)).bool() & reached
    radii = gate.bias.clamp(min=torch.finfo(gate.bias.dtype).tiny)
    return answering, gate.values.norm(dim=1) * u.norm(dim=1).mean() / radii


def _neurons(
    view: ModelView, place: int, delta: Delta, rows: Sequence[Sequence[int]]
) -> Iterator[Finding]:
    """Of the layers whose MLP's linears a delta changes, as the view computes them.

    A gated MLP's other factor is left out of the gain: it is near 1 in size.
    """
    for layer in range(view.n_layers):
        gate, down = view.part(layer, "gate_proj"), view.down_proj(layer)
        if not any(_linear(delta.effects.get(path)) for path in (gate, down)):
            continue
        x = token_inputs(view, {0: gate, 1: down}, rows)
        length = outputs(view, down, x[1]).norm(dim=1).mean()
        W, bias = linear(view, gate)
        scale = sphere_of(view, layer).weight
        turns = torch.where(scale != 0, W / scale, 0.0).norm(dim=1)
        gains = turns * linear(view, down)[0].norm(dim=0) / length
        (steep,) = (gains >= STEEP_NEURON).nonzero(as_tuple=True)
        shares = (F.linear(x[0], W[steep], bias[steep]) > 0).float().mean(dim=0).tolist()
        for neuron, share in zip(steep.tolist(), shares, strict=True):
            if share <= RARE:
                yield Finding(place, gate, neuron, "neuron", 1 - share, float(gains[neuron]))


def _linear(effect: Effect | None) -> bool:
    """Whether an effect has a part that is no gate."""
    return effect is not None and any(not name.startswith("gates.") for name in effect.parts())
