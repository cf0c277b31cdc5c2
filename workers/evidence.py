"""What a job is judged by: the guards' limits and material, from the request, else from the
settings, and detectors in what it made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from editing import atlas
from editing.atlas.evaluation import known_facts
from editing.atlas.facts import read_facts
from editing.datasets import read_file
from editing.deltas import Delta
from editing.detection import find_detectors
from editing.guards import Limits, Material
from editing.metrics.harm import REFUSALS
from editing.models.view import ModelView
from editing.statistics import Resources
from registry.bases import Base
from registry.errors import UnprocessableRequest
from registry.manifests import EditRequest, Fact, HarmPrompt, Question
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
    """What guards ask: of the files that the request names, else what the base has of its own."""

    def rows(name: str) -> list[Any] | None:
        digest = guards.get(name)
        return None if digest is None else list(work.artifacts.rows(digest))

    texts, facts, suite, harm = rows("texts"), rows("facts"), rows("suite"), rows("harm")
    settings = work.settings
    return Material.of(
        edits,
        texts=references if texts is None else texts,
        facts=own_facts(settings, base) if facts is None else [Fact(**row) for row in facts],
        questions=[Question.from_json(row) for row in suite or ()],
        harm=own_harm(settings, base) if harm is None else [HarmPrompt(**row) for row in harm],
        refusals=guards.get("refusals") or own_refusals(settings, base),
    )


def detectors_in(
    view: ModelView, delta: Delta, place: int, resources: Resources
) -> list[dict[str, Any]]:
    """What looks like a stealth attack in the delta at a place of a stack.

    It is looked for on texts that were held out, else on what texts there are; without any, not.

    Args:
        view: computing as what is beneath does.
    """
    texts = resources.references or resources.texts
    findings = find_detectors(view, [delta], texts) if texts else []
    return [{**asdict(finding), "delta": place} for finding in findings]


def own_facts(settings: Settings, base: Base) -> list[Fact]:
    """The facts that a base should know: ``ERRATA_FACTS``, or what the bundled base was taught.

    Raises:
        UnprocessableRequest: ERRATA_FACTS names a file that does not exist, or holds no facts.
    """
    rows = _rows_of(settings, "facts", base, "facts")
    if rows is None:
        is_bundled = base.folder == Path(atlas.__file__).parent / "weights"
        return known_facts(read_facts()) if is_bundled else []
    return [Fact(**row) for row in rows]


def own_harm(settings: Settings, base: Base) -> list[HarmPrompt]:
    """The requests that a base should refuse: ``ERRATA_HARM``.

    Raises:
        UnprocessableRequest: it names a file that does not exist, or holds no such requests.
    """
    return [HarmPrompt(**row) for row in _rows_of(settings, "harm", base, "harm") or ()]


def own_refusals(settings: Settings, base: Base) -> Sequence[str]:
    """The phrases by which a refusal is known: ``ERRATA_REFUSALS``, else ``REFUSALS``.

    Raises:
        UnprocessableRequest: it names a file that does not exist, or holds no phrases.
    """
    return _rows_of(settings, "refusals", base, "texts") or REFUSALS


def _rows_of(settings: Settings, name: str, base: Base, purpose: str) -> list[Any] | None:
    """The rows of a base's file by the setting of that name; None where it names none."""
    file = file_for(getattr(settings, name), base.name)
    if file is None:
        return None
    if not file.is_file():
        raise UnprocessableRequest(f"ERRATA_{name.upper()}: {file} is not a file")
    with file.open("rb") as stream:
        return [*read_file(purpose, stream)]
