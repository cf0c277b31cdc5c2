"""What a version carries: which ancestors' work is in its deltas.

A version makes the delta on top of its stack, unless it is a revert's, which makes none. What is
in a delta follows from the graph of versions (``registry.versions.lineage``):

- the work of the version that made it;
- where it was made in another's place (``replaces`` in the recipe): what is in that one too;
- where it is a merge's or a flatten's: what is in all deltas of the version's parents.

A version's live edits are those in the deltas of its stack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

from registry.versions import Version

#: Kinds of versions whose one delta holds what their parents' stacks hold.
MERGE, FLATTEN, REVERT = "merge", "flatten", "revert"


@dataclass(frozen=True)
class Origin:
    """A delta as it was first made, and the versions whose work is in it.

    Attributes:
        within: the delta of the head's stack that it is in now: itself, or a flattened one.
        versions: oldest first; several where edits were trained anew together.
    """

    delta: str
    within: str
    versions: tuple[Version, ...]


def edited(chain: Sequence[Version]) -> Iterator[tuple[Version, str]]:
    """The versions of a lineage whose edits its head carries, in the lineage's order, with the
    delta of the head's stack that holds them."""
    graph = _Graph(chain)
    within: dict[str, str] = {}
    for delta in chain[0].manifest.stack:
        for version in graph.work_in(delta, through={MERGE, FLATTEN}):
            within.setdefault(version.id, delta)
    for version in chain:
        recipe = version.manifest.recipe
        if version.id in within and recipe.get("kind") == "edit" and recipe.get("edit_count"):
            yield version, within[version.id]


def origins(chain: Sequence[Version]) -> list[Origin]:
    """What a lineage's head computes with, as it was first made: flattened deltas unfolded."""
    graph, stack = _Graph(chain), chain[0].manifest.stack
    return [Origin(made, now, work) for now in stack for made, work in graph.unfolded(now)]


class _Graph:
    """A lineage, by version and by the deltas that its versions made."""

    def __init__(self, chain: Sequence[Version]) -> None:
        self._chain = chain
        self._versions = {version.id: version for version in chain}
        #: Newest first. Equal work makes equal bytes: of several makers the newest counts, and
        #: those before it where it made the delta in the delta's own place.
        self._makers: dict[str, list[Version]] = {}
        for version in chain:
            if version.manifest.stack and _kind(version) != REVERT:
                self._makers.setdefault(version.manifest.stack[-1], []).append(version)

    def work_in(self, delta: str, through: Set[str] = frozenset()) -> tuple[Version, ...]:
        """The versions whose work is in a delta, oldest first.

        Args:
            through: the kinds of versions into whose parents to look.
        """
        found: set[str] = set()
        waiting = [delta]
        while waiting:
            made = waiting.pop()
            for version in self._makers.get(made, ()):
                replaced = version.manifest.recipe.get("replaces")
                if version.id not in found:
                    found.add(version.id)
                    if _kind(version) in through:
                        waiting += self._beneath(version)
                    elif replaced is not None:
                        waiting.append(replaced)
                if replaced != made:
                    break
        return tuple(version for version in reversed(self._chain) if version.id in found)

    def unfolded(self, delta: str) -> Iterator[tuple[str, tuple[Version, ...]]]:
        """The deltas that were flattened into one, each with the versions whose work it is.

        Each flatten is unfolded once: what an archive brought may be beneath itself.
        """
        waiting, seen = [delta], set[str]()
        while waiting:
            made = waiting.pop()
            work = self.work_in(made)
            if work and _kind(work[-1]) == FLATTEN and work[-1].id not in seen:
                seen.add(work[-1].id)
                waiting += reversed(self._beneath(work[-1]))
            else:
                yield made, work

    def _beneath(self, version: Version) -> list[str]:
        parents = (self._versions[parent] for parent in version.manifest.parents)
        return [delta for parent in parents for delta in parent.manifest.stack]


def _kind(version: Version) -> str:
    return str(version.manifest.recipe.get("kind"))
