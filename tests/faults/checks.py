"""What must be true after a run, seen from outside: over REST, in SQL, and in the stored files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, Table, select

from registry import tables
from tests.faults.acts import Acted
from tests.faults.reader import Reader
from tests.faults.stage import Stage

ENDED = ("succeeded", "failed", "cancelled")


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


def judge(stage: Stage, endpoint: str, acted: Acted, reader: Reader, may_fail: bool) -> Verdict:
    """Look at everything that a run left.

    Args:
        may_fail: whether the strike is a reason for a job to end as failed.
    """
    with stage.sql.connect() as connection:
        jobs = _rows(connection, tables.jobs, endpoint=endpoint)
        made = _rows(connection, tables.versions)
        moves = _rows(connection, tables.moves, endpoint=endpoint)
        (row,) = _rows(connection, tables.endpoints, name=endpoint)
        events = [e for job in jobs for e in _rows(connection, tables.events, job_id=job.id)]
        attempts = [a for job in jobs for a in _rows(connection, tables.attempts, job_id=job.id)]
    moves.sort(key=lambda move: move.generation)
    versions = {version.id: version for version in made}
    lost, doubled = [], []
    if acted.job is not None:
        lost += _lost(acted.job, jobs, events, attempts, may_fail)
        doubled += _doubled(acted.job, jobs, made)
    unverified = [
        *_replayed(row, moves),
        *(fault for move in moves for fault in _verified(stage, move, versions)),
        *_arrived(stage, endpoint, acted, row, jobs),
    ]
    named = {move.generation: move.after[0]["version"] for move in moves if move.after}
    texts = {version: stage.says(version) for version in named.values()}
    assert len(texts) == 1 or len(set(texts.values())) > 1, f"a reader sees nothing: {texts}"
    return Verdict(lost, doubled, unverified, reader.torn(named, texts))


def _rows(connection: Connection, table: Table, **values: object) -> list[Row[Any]]:
    query = select(table).where(*(table.c[name] == value for name, value in values.items()))
    return list(connection.execute(query))


def _lost(
    job_id: str,
    jobs: Sequence[Row[Any]],
    events: Sequence[Row[Any]],
    attempts: Sequence[Row[Any]],
    may_fail: bool,
) -> list[str]:
    """The acknowledged job ended once, and well."""
    job = next((job for job in jobs if job.id == job_id), None)
    if job is None:
        return [f"job {job_id} was acknowledged and is not there"]
    found = []
    if job.status != "succeeded" and not (may_fail and job.status == "failed"):
        found.append(f"job {job_id} is {job.status}: {job.error}")
    ends = [event.data for event in events if event.data.get("status") in ENDED]
    if len(ends) != 1 or ends[0]["status"] != job.status:
        found.append(f"job {job_id} is {job.status} and ended so often: {ends}")
    outcomes = [attempt.outcome for attempt in attempts]
    if outcomes[-1:] != [job.status] or len(set(outcomes) & set(ENDED)) != 1:
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


def _verified(stage: Stage, move: Row[Any], versions: dict[str, Row[Any]]) -> list[str]:
    """What a move named is ready, and its artifacts hold what their names say."""
    found = []
    for target in move.after or ():
        version = versions.get(target["version"])
        if version is None or version.status != "ready":
            found.append(f"{target} is named, and is {version and version.status}")
            continue
        for digest in version.manifest["stack"]:
            path = stage.data / "artifacts" / digest[:2] / digest
            held = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
            if held != digest:
                found.append(f"{version.id}: artifact {digest} holds {held}")
    return found


def _arrived(
    stage: Stage, endpoint: str, acted: Acted, row: Row[Any], jobs: Sequence[Row[Any]]
) -> list[str]:
    """The endpoint is where the answers to the client say; REST and SQL say the same."""
    found = []
    shown = stage.insist("GET", f"/v1/endpoints/{endpoint}").body
    if (shown["version"], shown["generation"]) != (row.state[0]["version"], row.generation):
        found.append(f"REST shows {shown}, and SQL has {row}")
    wanted, generation = acted.version, acted.generation
    if acted.job is not None:
        job = next((job for job in jobs if job.id == acted.job), None)
        if job is None or not job.activated:
            return found
        wanted, generation = job.version_id, 2
    if (shown["version"], shown["generation"]) != (wanted, generation):
        found.append(f"REST shows {shown}, and {acted} leads to {wanted} at {generation}")
    return found
