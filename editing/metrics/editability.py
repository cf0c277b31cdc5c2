"""Editability: how well a layer tells prompts apart, known before anyone edits (Zhou et al. 2024).

"Stealth edits to large language models", arXiv:2406.12670. Of the features z of a layer's MLP
(``sphere.py``), with x and y drawn independently from their distribution D, the intrinsic
dimension is

    n(D, δ) = -1 - log2 P(⟨x - y, y⟩ >= δ)

after "Relative intrinsic dimensionality is intrinsic to learning" (Sutton et al. 2023,
arXiv:2311.07579); n is d for the uniform ball and δ = 0. A detector with threshold θ of a random
prompt answers to another one with a probability of at most

    √(2^(-n(D, 2θ(θ - 2)) - 1))

whatever the detector's prompt, since two features in one cap are near each other. The higher n is,
the more surely an edit of one prompt leaves others alone, and the more easily an attacker adds a
trigger that nobody meets by chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from editing.models.sphere import token_features
from editing.models.view import ModelView
from registry.errors import InvalidRequest

#: The threshold of published stealth edits.
THETA = 0.005


def editability(
    view: ModelView,
    prompts: Sequence[str],
    layers: Sequence[int] | None = None,
    theta: float = THETA,
) -> dict[str, object]:
    """Measure layers (by default all) on the features of the prompts' last tokens.

    Returns:
        ``theta``, ``prompts`` (how many different ones), ``best_layer`` (of the highest exposure,
        then dimension) and ``layers``, each with

        - ``layer``;
        - ``intrinsic_dimension``: n(D, 2θ(θ-2)) over pairs of different prompts;
        - ``at_least``: whether that is a lower bound: no pair was that near, so that P is taken as
          one in as many pairs as there were, and more prompts would show a higher dimension;
        - ``false_positive_bound``: most that the probability may be that an edit of one prompt
          answers to another one, from 0 to 1;
        - ``exposure``: 1 - that: higher is easier to edit, and more exposed to a stealth attack;
        - ``nearest``: largest cosine between the features of two prompts. An edit of each answers
          to it alone where θ < 1 - nearest.

    Raises:
        InvalidRequest: fewer than two different prompts, an empty one, or no such layer.
    """
    for i, prompt in enumerate(prompts):
        if not prompt.strip():
            raise InvalidRequest(f"prompts.{i} is empty", param=f"prompts.{i}")
    different = list(dict.fromkeys(prompts))
    if len(different) < 2:
        raise InvalidRequest(
            f"prompts holds {len(different)} different prompt(s); at least two are compared,"
            " a hundred or more tell something",
            param="prompts",
        )
    chosen = range(view.n_layers) if layers is None else layers
    features = token_features(view, chosen, different, last=True)
    rows = [_layer(layer, features[layer], theta) for layer in chosen]
    best = max(rows, key=lambda row: (row["exposure"], row["intrinsic_dimension"]))
    return {
        "theta": theta,
        "prompts": len(different),
        "best_layer": best["layer"],
        "layers": rows,
    }


def intrinsic_dimension(features: Tensor, delta: float) -> tuple[float, bool]:
    """n(D, δ) of features [n, d], and whether it is a lower bound: no pair x, y was counted."""
    products = features.double() @ features.double().T
    near = products - products.diagonal() >= delta  # [x, y]: ⟨x - y, y⟩
    near.fill_diagonal_(False)
    pairs, count = len(features) * (len(features) - 1), int(near.sum())
    return -1 - math.log2(max(count, 1) / pairs), count == 0


def _layer(layer: int, features: Tensor, theta: float) -> dict[str, float | bool]:
    dimension, at_least = intrinsic_dimension(features, 2 * theta * (theta - 2))
    bound = min(1.0, math.sqrt(2 ** (-dimension - 1)))
    cosines = torch.nn.functional.normalize(features, dim=1)
    cosines = (cosines @ cosines.T).fill_diagonal_(-1)
    return {
        "layer": layer,
        "intrinsic_dimension": dimension,
        "at_least": at_least,
        "false_positive_bound": bound,
        "exposure": 1 - bound,
        "nearest": min(1.0, float(cosines.max())),
    }
