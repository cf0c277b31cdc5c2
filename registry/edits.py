"""The edits that a version carries: those of its ancestors whose deltas it still computes with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from registry.versions import Version


def edited(chain: Sequence[Version]) -> Iterator[tuple[Version, str]]:
    """The versions of a lineage (newest first) whose edits its head carries, with their deltas.

    An edit is carried while its delta, or one that was trained anew in its place (``replaces`` in
    the recipe), is in the head's stack.
    """
    stack = set(chain[0].manifest.stack)
    replaced: dict[str, str] = {}
    for version in chain:
        recipe = version.manifest.recipe
        if recipe.get("kind") != "edit" or not recipe.get("edit_count"):
            continue
        own = version.manifest.stack[-1]
        delta = replaced.get(own, own)
        if recipe.get("replaces"):
            replaced[recipe["replaces"]] = delta
        if delta in stack:
            yield version, delta
