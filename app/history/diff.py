"""How two versions differ, as their stacks and the files of their deltas say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

from app.history.schemas import DeltaBody, DiffBody, EditLine, EditLines, ModuleBody
from app.services import Services
from registry.edits import edited, origins
from registry.versions import Version
from workers.contents import read_contents

#: Most edits that are listed of each version.
LISTED = 1000

Said = tuple[str, str]


def diff(services: Services, version: Sequence[Version], against: Sequence[Version]) -> DiffBody:
    """Between the heads of two lineages."""
    stacks = version[0].manifest.stack, against[0].manifest.stack
    pairs = zip(*stacks, strict=False)
    first, second = dict(_live(services, version)), dict(_live(services, against))
    return DiffBody(
        version=version[0].id,
        against=against[0].id,
        same_base=version[0].manifest.base == against[0].manifest.base,
        common=[one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)],
        version_only=_deltas(services, version, stacks[1]),
        against_only=_deltas(services, against, stacks[0]),
        edits_version_only=_lines([line for said, line in first.items() if said not in second]),
        edits_against_only=_lines([line for said, line in second.items() if said not in first]),
    )


def _deltas(services: Services, chain: Sequence[Version], others: Sequence[str]) -> list[DeltaBody]:
    """What a head's stack holds beside the deltas of another one."""
    makers: dict[str, list[str]] = {}
    for origin in origins(chain):
        makers.setdefault(origin.within, []).extend(v.id for v in origin.versions)
    return [
        _delta(services, digest, makers[digest])
        for digest in chain[0].manifest.stack
        if digest not in others
    ]


def _delta(services: Services, digest: str, versions: list[str]) -> DeltaBody:
    contents = read_contents(services.artifacts, digest)
    return DeltaBody(
        digest=digest,
        method=contents.method,
        versions=versions,
        modules=[
            ModuleBody(
                module=touched.module,
                kinds=list(touched.kinds),
                rank=touched.rank,
                shape=touched.shape,
                norm=touched.norm,
            )
            for touched in contents.modules
        ],
    )


def _live(services: Services, chain: Sequence[Version]) -> Iterator[tuple[Said, EditLine]]:
    """The live edits of a lineage's head, by what each says: its prompt, and what shall follow."""
    for version, _ in edited(chain):
        for place, edit in enumerate(services.edits(version.manifest.recipe["edits"])):
            yield _said(edit), _line(version, place, edit)


def _said(edit: dict[str, Any]) -> Said:
    prompt = edit["prompt"].replace("{}", edit.get("subject") or "{}", 1)
    return prompt, edit.get("target_new") or edit.get("redirect_to") or ""


def _line(version: Version, place: int, edit: dict[str, Any]) -> EditLine:
    return EditLine(
        edit=f"{version.id}.{place}",
        version=version.id,
        prompt=edit["prompt"],
        subject=edit.get("subject"),
        target_new=edit.get("target_new"),
        redirect_to=edit.get("redirect_to"),
    )


def _lines(lines: list[EditLine]) -> EditLines:
    return EditLines(count=len(lines), data=lines[:LISTED])
