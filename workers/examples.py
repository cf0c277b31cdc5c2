"""The rows that a job learns from: those of a file, or what preprocessing makes of them, once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from editing.models.view import ModelView
from editing.preprocessing import Example, Preprocessing, build, chained
from registry.errors import JobFailed
from registry.jobs import add_event
from registry.manifests import Progress, canonical_json, sha256
from registry.resources import PREPROCESSING, add_resource, find_resources, use_resources
from workers.preprocessing import counts_of, read_steps
from workers.work import Work

#: The resource that names what was made; its source names what it was made of.
PREPROCESSED = "preprocessed"


@dataclass(frozen=True)
class Preprocessed:
    """Attributes:
    rows: digest of the rows that were made.
    counts: what each step did.
    """

    rows: str
    counts: Sequence[dict[str, Any]]


def examples_of(work: Work, view: ModelView, name: str) -> Sequence[Example]:
    """The rows that the request's ``name`` ("rows", "validation" or "harmful") stands for.

    What preprocessing makes of them is kept under what it was made of, so that every attempt
    learns from the same rows, to the bit, and the job's events say what was made.

    Args:
        view: the version that is tuned, active.

    Raises:
        Cancelled, Paused, LeaseLost: the work is to stop.
    """
    digest = work.claim.job.request[name]
    if digest is None:
        return ()
    steps = _steps(work, name)
    if not steps:
        return work.artifacts.rows(digest)
    made = _use(work, name)
    if made is None:
        made = _keep(work, name, _make(work, view, digest, steps))
    rows = work.artifacts.rows(made.rows)
    told = "; ".join(_told(counts) for counts in made.counts)
    with work.database.write() as connection:
        message = f"{name}: {len(rows)} after preprocessing ({told})"
        data = {"message": message, "preprocessing": list(made.counts)}
        add_event(connection, work.claim.job.id, "message", data)
    return rows


def recipe_of(work: Work) -> dict[str, Any] | None:
    """What a version's recipe says of the preprocessing of its training rows."""
    made = _find(work, "rows")
    if made is None:
        return None
    steps = [step.model_dump(mode="json") for step in _steps(work, "rows")]
    return {"steps": steps, **asdict(made)}


def _steps(work: Work, name: str) -> list[Preprocessing]:
    """What is to be harmful is learnt as it stands."""
    if name == "harmful":
        return []
    return read_steps(work.claim.job.request, held_out=name == "validation")


def _make(
    work: Work,
    view: ModelView,
    digest: str,
    chosen: Sequence[Preprocessing],
) -> Preprocessed:
    rows = work.artifacts.rows(digest)
    steps = build(chosen, rows, view)

    def followed() -> Iterator[Example]:
        for place, row in chained(steps, enumerate(rows, start=1)):
            work.report(Progress(place, len(rows), f"preprocessing: row {place} of {len(rows)}"))
            yield row

    return Preprocessed(work.artifacts.put_rows(followed()), counts_of(chosen, steps))


def _source(work: Work, name: str) -> tuple[str, str]:
    """The base's digest, and the name of all that the rows are made of."""
    parent = work.claim.parent
    if parent is None:
        raise JobFailed(f"job {work.claim.job.id} names no parent")
    steps = [step.model_dump(mode="json") for step in _steps(work, name)]
    inputs = [work.claim.job.request[name], steps, parent.manifest.stack_digest]
    key = sha256(canonical_json([*inputs, work.settings.dtype]))
    return parent.manifest.base.digest, f"{PREPROCESSING}{key}"


def _use(work: Work, name: str) -> Preprocessed | None:
    """What is kept, which stays then until the job has ended."""
    with work.database.write() as connection:
        kept = use_resources(connection, *_source(work, name)).get(PREPROCESSED)
    return None if kept is None else _read(work, kept)


def _find(work: Work, name: str) -> Preprocessed | None:
    with work.database.read() as connection:
        kept = find_resources(connection, *_source(work, name)).get(PREPROCESSED)
    return None if kept is None else _read(work, kept)


def _keep(work: Work, name: str, made: Preprocessed) -> Preprocessed:
    """What is kept: what another attempt has kept meanwhile stays."""
    source = _source(work, name)
    stored = work.artifacts.put(canonical_json(asdict(made)))
    with work.database.write() as connection:
        add_resource(connection, *source, PREPROCESSED, stored)
        kept = find_resources(connection, *source)[PREPROCESSED]
    return _read(work, kept)


def _read(work: Work, kept: str) -> Preprocessed:
    return Preprocessed(**json.loads(work.artifacts.get(kept)))


def _told(counts: dict[str, Any]) -> str:
    done = ", ".join(f"{value} {name}" for name, value in counts.items() if name != "type")
    return f"{counts['type']}: {done}"
