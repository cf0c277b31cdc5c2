"""What must be true after a run, seen from outside: over REST, in SQL, and in the stored files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, Table, select

from registry import tables
from tests.faults.acts import Acted
from tests.faults.reader import Reader
from tests.faults.stage import Stage

ENDED = ("succeeded", "failed", "cancelled")


class ShowsNothing(AssertionError):
    """A run from which nothing follows: no promise is seen to break, and none to be kept."""


@dataclass(frozen=True)
class Verdict:
    """What was wrong, by the promise that it breaks."""

    lost: Sequence[str] = ()
    doubled: Sequence[str] = ()
    unverified: Sequence[str] = ()
    torn: Sequence[str] = ()

    @property
    def broken(self) -> dict[str, Sequence[str]]:
        return {name: found for name, found in vars(self).items() if found}


@dataclass(frozen=True)
class Rows:
    """What SQL holds of an endpoint after a run.

    Args:
        endpoint: its own row.
        moves: by generation.
        attempts: by job and number.
        versions: all that there are, whosesoever.
    """

    endpoint: Row[Any]
    moves: Sequence[Row[Any]]
    jobs: Sequence[Row[Any]]
    events: Sequence[Row[Any]]
    attempts: Sequence[Row[Any]]
    versions: Sequence[Row[Any]]

    @property
    def named(self) -> dict[int, str]:
        """The version of each generation."""
        return {move.generation: move.after[0]["version"] for move in self.moves if move.after}

    @property
    def ready(self) -> set[str]:
        """Those of the named versions that can be asked."""
        ready = {version.id for version in self.versions if version.status == "ready"}
        return ready & set(self.named.values())


def read(connection: Connection, endpoint: str) -> Rows:
    jobs = _rows(connection, tables.jobs, endpoint=endpoint)
    moves = _rows(connection, tables.moves, endpoint=endpoint)
    attempts = [a for job in jobs for a in _rows(connection, tables.attempts, job_id=job.id)]
    (row,) = _rows(connection, tables.endpoints, name=endpoint)
    return Rows(
        endpoint=row,
        moves=sorted(moves, key=lambda move: move.generation),
        jobs=jobs,
        events=[e for job in jobs for e in _rows(connection, tables.events, job_id=job.id)],
        attempts=sorted(attempts, key=lambda attempt: (attempt.job_id, attempt.attempt)),
        versions=_rows(connection, tables.versions),
    )


def judge(stage: Stage, endpoint: str, acted: Acted, reader: Reader, may_fail: bool) -> Verdict:
    """Look at everything that a run left.

    Args:
        may_fail: whether the strike is a reason for a job to end as failed.

    Raises:
        ShowsNothing: no reader can tell the endpoint's versions apart.
    """
    with stage.sql.connect() as connection:
        rows = read(connection, endpoint)
    shown = stage.insist("GET", f"/v1/endpoints/{endpoint}").body
    texts = {version: stage.says(version) for version in rows.ready}
    artifacts = stage.data / "artifacts"
    verdict = compare(rows, acted, reader, shown, texts, artifacts, may_fail=may_fail)
    if not verdict.broken and len(texts) > 1 and len(set(texts.values())) == 1:
        raise ShowsNothing(f"{endpoint}: its versions say the same: {texts}")
    return verdict


def compare(
    rows: Rows,
    acted: Acted,
    reader: Reader,
    shown: Mapping[str, Any],
    texts: Mapping[str, str],
    artifacts: Path,
    *,
    may_fail: bool,
) -> Verdict:
    """Hold what a run left against what is promised.

    Args:
        shown: the endpoint over REST.
        texts: what each ready version says.
        artifacts: the folder.
        may_fail: whether the strike is a reason for a job to end as failed.
    """
    lost, doubled = _unseen(rows.endpoint, reader), []
    if acted.job is not None:
        lost += _lost(acted.job, rows, may_fail)
        doubled += _doubled(acted.job, rows.jobs, rows.versions)
    versions = {version.id: version for version in rows.versions}
    unverified = [
        *_replayed(rows.endpoint, rows.moves),
        *(fault for move in rows.moves for fault in _verified(artifacts, move, versions)),
        *_arrived(shown, acted, rows),
    ]
    return Verdict(lost, doubled, unverified, reader.torn(rows.named, texts))


def _rows(connection: Connection, table: Table, **values: object) -> list[Row[Any]]:
    query = select(table).where(*(table.c[name] == value for name, value in values.items()))
    return list(connection.execute(query))


def _unseen(endpoint: Row[Any], reader: Reader) -> list[str]:
    """In the end who asks gets an answer."""
    if reader.has_seen(endpoint.generation):
        return []
    last = reader.answers[-1:]
    return [f"{endpoint.name} is at {endpoint.generation}, and the last answer of it was {last}"]


def _lost(job_id: str, rows: Rows, may_fail: bool) -> list[str]:
    """The acknowledged job ended once, and well."""
    job = next((job for job in rows.jobs if job.id == job_id), None)
    if job is None:
        return [f"job {job_id} was acknowledged and is not there"]
    found = []
    if job.status != "succeeded" and not (may_fail and job.status == "failed"):
        found.append(f"job {job_id} is {job.status}: {job.error}")
    ends = [event.data for event in rows.events if event.data.get("status") in ENDED]
    if len(ends) != 1 or ends[0]["status"] != job.status:
        found.append(f"job {job_id} is {job.status} and ended so often: {ends}")
    outcomes = [attempt.outcome for attempt in rows.attempts if attempt.job_id == job_id]
    if outcomes[-1:] != [job.status] or sum(outcome in ENDED for outcome in outcomes) != 1:
        found.append(f"job {job_id} is {job.status} after attempts that were {outcomes}")
    return found


def _doubled(job_id: str, jobs: Sequence[Row[Any]], made: Sequence[Row[Any]]) -> list[str]:
    """One Idempotency-Key made one job, and that one version at most."""
    found = []
    if len(jobs) > 1:
        found.append(f"one Idempotency-Key made jobs {[job.id for job in jobs]}")
    results = [v.id for v in made if job_id in (v.job_id, v.manifest["recipe"].get("job"))]
    ended = next((job for job in jobs if job.id == job_id), None)
    if len(results) > 1 or (ended is not None and results != [v for v in [ended.version_id] if v]):
        found.append(f"job {job_id} names {ended and ended.version_id}, and made {results}")
    return found


def _replayed(endpoint: Row[Any], moves: Sequence[Row[Any]]) -> list[str]:
    """The history, from its first row on, gives the state."""
    found, state = [], None
    for place, move in enumerate(moves, start=1):
        if move.generation != place or move.before != state:
            found.append(f"move {place} of {endpoint.name} does not follow {state}: {move}")
        if move.kind == "rollback" and move.after != moves[move.origin - 1].after:
            found.append(f"a rollback to generation {move.origin} gave {move.after}")
        state = move.after
    if (endpoint.generation, endpoint.state) != (len(moves), state):
        found.append(f"{endpoint.name} is {endpoint}, and its {len(moves)} moves give {state}")
    return found


def _verified(artifacts: Path, move: Row[Any], versions: Mapping[str, Row[Any]]) -> list[str]:
    """What a move named is ready, and its artifacts hold what their names say."""
    found = []
    for target in move.after or ():
        version = versions.get(target["version"])
        if version is None or version.status != "ready":
            found.append(f"{target} is named, and is {version and version.status}")
            continue
        for digest in version.manifest["stack"]:
            path = artifacts / digest[:2] / digest
            held = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
            if held != digest:
                found.append(f"{version.id}: artifact {digest} holds {held}")
    return found


def _arrived(shown: Mapping[str, Any], acted: Acted, rows: Rows) -> list[str]:
    """The endpoint is where the answers to the client say; REST and SQL say the same.

    Nobody else moves it: a job that succeeds moves it on, and any other leaves it alone.
    """
    found, row = [], rows.endpoint
    seen = shown.get("version"), shown.get("generation")
    if seen != (row.state[0]["version"], row.generation):
        found.append(f"REST shows {shown}, and SQL has {row}")
    wanted = acted.version, acted.generation
    job = next((job for job in rows.jobs if job.id == acted.job), None)
    if job is not None and job.activated != (job.status == "succeeded"):
        found.append(f"job {job.id} is {job.status}, activated: {job.activated} ({job.reason})")
    if job is not None and job.status == "succeeded":
        wanted = job.version_id, acted.generation + 1
    if seen != wanted:
        found.append(f"REST shows {shown}, and {acted} leads to {wanted}")
    return found
