"""What can be done with a version's history: take work out of its middle, do work again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from registry.edits import Origin, origins
from registry.errors import NotFound, UnprocessableRequest
from registry.versions import Version

#: Kinds of recipes that can be run again on another parent.
RERUN = ("edit", "fine_tune")


@dataclass(frozen=True)
class Removal:
    """How work is taken out of a stack.

    Attributes:
        delta: the delta of the stack that is the work and nothing else; None where the work shares
            one with other work, so that only a replay takes it out.
        removed: the versions whose work goes.
        below: the deltas beneath it, as they were first made.
        later: the versions whose recipes a replay runs again, oldest first.
    """

    delta: str | None
    removed: tuple[Version, ...]
    below: tuple[str, ...]
    later: tuple[Version, ...]


def removal(
    chain: Sequence[Version],
    *,
    delta: str | None = None,
    version: str | None = None,
    replay: bool = False,
) -> Removal:
    """How to take a delta, or what one version made, out of the stack of a lineage's head.

    Raises:
        NotFound: the head does not carry it.
        UnprocessableRequest: it shares a delta, or a later recipe cannot run again.
    """
    field, name = ("delta", delta) if version is None else ("version", version)
    found, stack = origins(chain), chain[0].manifest.stack
    if delta in stack:
        places = [place for place, origin in enumerate(found) if origin.within == delta]
        removed = [v for place in places for v in found[place].versions]
    else:
        places = [p for p, o in enumerate(found) if o.delta == delta or _of(o, delta, version)][:1]
        if not places:
            raise NotFound(
                f"{field}: version {chain[0].id} does not carry {name}; its stack and its lineage"
                " say what it carries",
                param=field,
                code=f"{field}_not_found",
            )
        origin = found[places[0]]
        removed = _of(origin, delta, version) or [*origin.versions]
        if origin.delta == origin.within and len(removed) == len(origin.versions):
            delta = origin.delta
    alone = delta if delta in stack else None
    if alone is None and not replay:
        raise UnprocessableRequest(
            f"{field}: {name} shares delta {found[places[0]].within} with other work; give"
            ' "replay": true, which makes the rest of it anew',
            param=field,
            code="replay_needed",
        )
    above = found[places[0] :]
    later = tuple(v for origin in above for v in origin.versions if v not in removed)
    if replay:
        _check_known(above[len(places) :], "replay")
        check_rerun(later, "replay")
    below = tuple(origin.delta for origin in found[: places[0]])
    return Removal(alone, tuple(removed), below, later)


def recipes(chain: Sequence[Version], field: str) -> tuple[Version, ...]:
    """The versions whose recipes made what a lineage's head is, oldest first.

    Raises:
        UnprocessableRequest: one cannot run again; ``field`` named the head.
    """
    found = origins(chain)
    versions = tuple(version for origin in found for version in origin.versions)
    _check_known(found, field)
    check_rerun(versions, field)
    return versions


def check_depth(version: Version, limit: int, field: str = "parent") -> None:
    """Refuse to build on a stack that is as deep as one may be. Raises UnprocessableRequest."""
    depth = len(version.manifest.stack)
    if depth >= limit:
        raise UnprocessableRequest(
            f"{field}: version {version.id} has {depth} deltas, and the limit is {limit}"
            f" (ERRATA_MAX_STACK); flatten it first: POST /v1/versions/{version.id}/flatten with"
            ' {"endpoint": the endpoint that is to go on from there}',
            param=field,
            code="stack_too_deep",
        )


def check_rerun(versions: Sequence[Version], field: str) -> None:
    """Refuse versions whose recipes cannot run again. Raises UnprocessableRequest."""
    for version in versions:
        kind = version.manifest.recipe.get("kind")
        if kind not in RERUN:
            raise UnprocessableRequest(
                f"{field}: version {version.id} was made by a job of kind {kind!r}, which does not"
                f" say how to make it anew on another parent; only {' and '.join(RERUN)} do. Take"
                " it out first, or leave it out of the history",
                param=field,
                code="not_replayable",
            )


def _check_known(found: Sequence[Origin], field: str) -> None:
    for origin in found:
        if not origin.versions:
            raise UnprocessableRequest(
                f"{field}: no version of the lineage made delta {origin.delta}, so that nothing"
                " says how to make it anew; take it out first",
                param=field,
                code="not_replayable",
            )


def _of(origin: Origin, delta: str | None, version: str | None) -> list[Version]:
    """Of the versions whose work an origin is, the one that is meant: by its id, or by the delta
    that it made, where another was made in that one's place."""
    if origin.delta == delta:
        return []
    return [v for v in origin.versions if v.id == version or v.manifest.stack[-1] == delta]
