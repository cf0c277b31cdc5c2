"""Processes that race to move one endpoint, by compare-and-swap on its generation.

``python -m tests.faults.racers --moves 1000 [--postgres]`` prints what came of it as JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from registry.database import Database
from registry.endpoints import create_endpoint, get_endpoint, move_endpoint
from registry.errors import PreconditionFailed
from registry.manifests import BaseRef, VersionManifest
from registry.moves import Target, history
from registry.versions import insert_version
from tests.servers import PostgresServer

TENANT, NAME = "default", "raced"
RACERS = 8
#: In which all racers must have started.
START_SECONDS = 120.0


@dataclass(frozen=True)
class Outcome:
    """What a race came to.

    Attributes:
        moves: tried by all racers together; each is won or refused.
        generation: the endpoint's, which began at 1.
        winners: how many generations had so many winners.
        replays: whether the history, from its first move on, leads to where the endpoint points.
    """

    database: str
    racers: int
    moves: int
    won: int
    refused: int
    generation: int
    winners: dict[int, int]
    replays: bool
    seconds: float


def race(url: str, moves: int, racers: int = RACERS) -> Outcome:
    """Let each of ``racers`` processes try ``moves`` moves on the database at ``url``."""
    database = Database(url)
    database.migrate()
    with database.write() as connection:
        versions = [
            insert_version(
                connection, TENANT, VersionManifest(BaseRef("b", "0" * 64), (digest,))
            ).id
            for digest in (f"{number:x}" * 64 for number in range(racers))
        ]
        create_endpoint(connection, TENANT, NAME, (Target(versions[0]),), actor="start")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["registry.versions", "registry.endpoints", "tests.servers"])
    started, won = context.Barrier(racers + 1), context.SimpleQueue()
    processes = [
        context.Process(target=_run, args=(url, version, moves, started, won), daemon=True)
        for version in versions
    ]
    for process in processes:
        process.start()
    started.wait(START_SECONDS)
    began = time.monotonic()
    generations: Counter[int] = Counter()
    for _ in processes:
        generations.update(won.get())
    seconds = time.monotonic() - began
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("a racer broke off; what it raised stands above")
    with database.read() as connection:
        endpoint = get_endpoint(connection, TENANT, NAME)
        replays = _replays(database, endpoint.generation, endpoint.head)
    database.close()
    return Outcome(
        database=url.split("+")[0].split(":")[0],
        racers=racers,
        moves=racers * moves,
        won=generations.total(),
        refused=racers * moves - generations.total(),
        generation=endpoint.generation,
        winners=dict(Counter(generations[g] for g in range(2, endpoint.generation + 1))),
        replays=replays,
        seconds=round(seconds, 3),
    )


def _run(url: str, version: str, moves: int, started: Any, won: Any) -> None:
    """One racer: it tells what it has won also where it breaks off."""
    database = Database(url)
    mine: list[int] = []
    started.wait(START_SECONDS)
    try:
        for _ in range(moves):
            _move(database, version, mine)
    finally:
        won.put(mine)
        database.close()


def _move(database: Database, version: str, mine: list[int]) -> None:
    """Read the generation, and move the endpoint on if it is still there."""
    with database.read() as connection:
        seen = get_endpoint(connection, TENANT, NAME).generation
    try:
        with database.write() as connection:
            moved = move_endpoint(
                connection,
                TENANT,
                NAME,
                (Target(version),),
                generation=seen,
                kind="set",
                actor=version,
            )
    except PreconditionFailed:
        return
    mine.append(moved.generation)


def _replays(database: Database, generation: int, head: str) -> bool:
    state, seen, after = None, 0, generation + 1
    with database.read() as connection:
        rows = []
        while page := history(connection, TENANT, NAME, after=after, limit=1000).items:
            rows += page
            after = page[-1].generation
    for move in reversed(rows):
        if (move.generation, move.before) != (seen + 1, state):
            return False
        seen, state = move.generation, move.after
    return seen == generation and state == (Target(head),)


@contextmanager
def raced_database(postgres: bool) -> Iterator[str]:
    """The URL of an empty database whose commits are durable."""
    if postgres:
        with PostgresServer(durable=True) as server:
            yield server.url(server.new_database())
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield f"sqlite:///{Path(folder) / 'registry.db'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moves", type=int, default=1000, help="Moves that each racer tries.")
    parser.add_argument("--racers", type=int, default=RACERS)
    parser.add_argument("--postgres", action="store_true", help="On PostgreSQL, else on SQLite.")
    options = parser.parse_args()
    with raced_database(options.postgres) as url:
        print(json.dumps(asdict(race(url, options.moves, options.racers)), indent=2))


if __name__ == "__main__":
    main()
