"""What an MLP reads, on the unit sphere: the parameters of the norm before it are undone.

A norm gives x = √d · z ⊙ w + b with ‖z‖ = 1 (RMSNorm has no b). Directions z are what selectivity
is measured in: two tokens are told apart by their angle, whatever the norm makes of it (Zhou et
al. 2024, arXiv:2406.12670).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editing.models.probing import outputs, token_inputs
from editing.models.view import ModelView

#: A norm's weight below this share of its largest hides what was there: it is left out.
SMALLEST = 1e-6


@dataclass(frozen=True)
class Sphere:
    """z = x ⊙ weight + offset, both [hidden] in fp32; 1/weight gives lengths in x."""

    weight: Tensor
    offset: Tensor

    def features(self, x: Tensor) -> Tensor:
        """What an MLP is given [..., hidden] -> z [..., hidden]."""
        return x.float() * self.weight + self.offset

    def row(self, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """w·z + b as rows [n, hidden] and biases [n] of a linear that reads x."""
        return w * self.weight, b + w @ self.offset


def sphere_of(view: ModelView, layer: int) -> Sphere:
    """Of a layer's MLP, whatever the family's norm: w and b are read off what the norm answers.

    ±1 in turns is its own standardised form; an odd norm of it gives b + w ⊙ (±1).
    """
    signs = torch.ones(view.hidden_size, device=view.device)
    signs[1::2] = -1
    probe = torch.stack([signs, -signs])
    up, down = outputs(view, view.part(layer, "mlp_norm"), probe)
    w, b = (up - down) / 2 * signs, (up + down) / 2
    used = w.abs() > SMALLEST * w.abs().max()
    weight = torch.where(used, 1 / (w * view.hidden_size**0.5), torch.zeros_like(w))
    return Sphere(weight, -b * weight)


def token_features(
    view: ModelView, layers: Sequence[int], texts: Sequence[str], last: bool = False
) -> dict[int, Tensor]:
    """z of every token of some texts, or of each text's last one: [tokens, hidden] by layer."""
    rows = [view.excerpt(text) for text in texts]
    paths = {layer: view.part(layer, "gate_proj") for layer in layers}
    found = token_inputs(view, paths, [row for row in rows if row], last)
    return {layer: sphere_of(view, layer).features(x) for layer, x in found.items()}
