"""Where versions contradict each other: signs, angles and norms of changes, and their edits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from editing.merging.geometry import cosine_matrix, gram
from registry.manifests import EditRequest

#: Most subjects that a report lists.
LISTED = 100
_DIGITS = 6


@dataclass
class _Sums:
    """Of some tensors: ⟨τ_i, τ_j⟩ [k, k], and how many entries at least one version changes, at
    least two, and in different directions."""

    gram: Tensor
    changed: int = 0
    shared: int = 0
    opposed: int = 0

    def plus(self, other: _Sums) -> _Sums:
        return _Sums(
            self.gram + other.gram,
            self.changed + other.changed,
            self.shared + other.shared,
            self.opposed + other.opposed,
        )

    def ordered(self, order: Sequence[int]) -> _Sums:
        return replace(self, gram=self.gram[order][:, order])

    def to_json(self) -> dict[str, Any]:
        return {
            "sign_disagreement": self.opposed / self.shared if self.shared else None,
            "shared": self.shared / self.changed if self.changed else None,
            "cosine": [[_number(x) for x in row] for row in cosine_matrix(self.gram).tolist()],
        }


@dataclass
class Conflicts:
    """The report on k versions, gathered tensor by tensor in one pass."""

    versions: Sequence[str]
    _layers: dict[int | None, _Sums] = field(default_factory=dict)

    def add(self, layer: int | None, taus: Tensor) -> None:
        """The changes τ [k, ...] of one tensor of a layer."""
        found = _Sums(gram(taus), *_signs(taus))
        known = self._layers.get(layer)
        self._layers[layer] = found if known is None else known.plus(found)

    def to_json(self, versions: Sequence[str]) -> dict[str, Any]:
        """The report, with the versions in the order that is given.

        Overall and by layer (null: outside of the layers): ``sign_disagreement``, of the entries
        that two versions or more change the share where their signs differ; ``shared``, what share
        these are of the changed ones; ``cosine`` between the versions' changes; ``norm_shares``,
        what share of each version's squared norm is in the layer. A figure without data is null.
        """
        order = [self.versions.index(version) for version in versions]
        whole = _Sums(torch.zeros(len(order), len(order), dtype=torch.float64))
        layers = {layer: sums.ordered(order) for layer, sums in self._layers.items()}
        for sums in layers.values():
            whole = whole.plus(sums)
        energies = whole.gram.diagonal()
        return {
            "versions": list(versions),
            **whole.to_json(),
            "norms": [_number(x) for x in energies.sqrt().tolist()],
            "layers": [
                {
                    "layer": layer,
                    **sums.to_json(),
                    "norm_shares": [_number(x) for x in (sums.gram.diagonal() / energies).tolist()],
                }
                for layer, sums in sorted(
                    layers.items(), key=lambda item: (item[0] is None, item[0] or 0)
                )
            ],
        }


def edit_conflicts(
    inputs: Mapping[str, Mapping[tuple[str, int], EditRequest]],
) -> dict[str, Any]:
    """The edits of one subject (or of one prompt, without a subject) that the versions do not have
    in common.

    Args:
        inputs: by version, its live edits by the version that made each and its place there: what
            versions have of a common ancestor is one edit.

    Returns: ``count``, and up to ``LISTED`` of them: ``subject``, ``same_prompt`` (one prompt has
        two targets) and the ``edits``, each with the versions that carry it.
    """
    carried: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    about: defaultdict[str, dict[tuple[str, int], EditRequest]] = defaultdict(dict)
    for version, edits in inputs.items():
        for origin, edit in edits.items():
            carried[origin].append(version)
            about[edit.topic.strip()][origin] = edit
    found = [
        (topic, edits)
        for topic, edits in about.items()
        if len({tuple(carried[origin]) for origin in edits}) > 1
    ]
    return {
        "count": len(found),
        "listed": [
            {
                "subject": topic,
                "same_prompt": _contradict(list(edits.values())),
                "edits": [
                    {
                        "id": f"{origin[0]}.{origin[1]}",
                        "versions": carried[origin],
                        "prompt": edit.prompt,
                        "target_new": edit.target_new or edit.redirect_to,
                    }
                    for origin, edit in edits.items()
                ],
            }
            for topic, edits in found[:LISTED]
        ],
    }


def _contradict(edits: Sequence[EditRequest]) -> bool:
    targets: defaultdict[str, set[str]] = defaultdict(set)
    for edit in edits:
        targets[edit.rewrite_prompt.strip()].add(edit.target_new.strip())
    return any(len(own) > 1 for own in targets.values())


def _signs(taus: Tensor) -> tuple[int, int, int]:
    """How many entries any version changes, two or more, and two in different directions."""
    up, down = (torch.zeros(taus.shape[1:], dtype=torch.uint8) for _ in range(2))
    for tau in taus:
        up += tau > 0
        down += tau < 0
    both = up + down
    counts = (both > 0, both > 1, (up > 0) & (down > 0))
    changed, shared, opposed = (int(flags.sum()) for flags in counts)
    return changed, shared, opposed


def _number(x: float) -> float | None:
    return round(x, _DIGITS) if x == x else None
