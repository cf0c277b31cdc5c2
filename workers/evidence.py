"""What guards judge a job by: its limits and material, from the request, else from the settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from editing import atlas
from editing.atlas.evaluation import known_facts
from editing.atlas.facts import read_facts
from editing.datasets import read_file
from editing.guards import Limits, Material
from registry.bases import Base
from registry.errors import UnprocessableRequest
from registry.manifests import EditRequest, Fact, Question
from registry.settings import Settings
from workers.recipes import file_for
from workers.work import Work


def limits_of(settings: Settings, guards: Mapping[str, Any]) -> Limits:
    """Each guard's limit: the request's, else ``ERRATA_GUARD_<NAME>``."""
    names = [field.name for field in fields(Limits)]
    chosen = {name: guards.get(name) for name in names}
    return Limits(
        **{
            name: getattr(settings, f"guard_{name}") if value is None else value
            for name, value in chosen.items()
        }
    )


def material_of(
    work: Work,
    base: Base,
    edits: Sequence[EditRequest],
    references: Sequence[str],
    guards: Mapping[str, Any],
) -> Material:
    """What guards ask: of the files that the request names, else the base's own texts and facts."""

    def rows(name: str) -> list[Any] | None:
        digest = guards.get(name)
        return None if digest is None else json.loads(work.artifacts.get(digest))

    texts, facts, suite = rows("texts"), rows("facts"), rows("suite")
    return Material.of(
        edits,
        texts=references if texts is None else texts,
        facts=own_facts(work.settings, base) if facts is None else [Fact(**row) for row in facts],
        questions=[Question.from_json(row) for row in suite or ()],
    )


def own_facts(settings: Settings, base: Base) -> list[Fact]:
    """The facts that a base should know: ``ERRATA_FACTS``, or what the bundled base was taught.

    Raises:
        UnprocessableRequest: ERRATA_FACTS names a file that does not exist, or holds no facts.
    """
    file = file_for(settings.facts, base.name)
    if file is None:
        is_bundled = base.folder == Path(atlas.__file__).parent / "weights"
        return known_facts(read_facts()) if is_bundled else []
    if not file.is_file():
        raise UnprocessableRequest(f"ERRATA_FACTS: {file} is not a file")
    return [Fact(**row) for row in read_file("facts", file.read_bytes())]
