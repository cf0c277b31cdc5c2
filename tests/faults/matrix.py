"""The kill matrix: ``python -m tests.faults.matrix`` strikes a running service at every point.

A run prepares an endpoint with a reader beside it, has a client ask for an edit, a move or a
rollback, holds the process that comes to the point, strikes, and waits for the end; then it looks
from outside at what is promised.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from tests.faults.acts import Acted, perform, prepare
from tests.faults.checks import ENDED, ShowsNothing, Verdict, judge
from tests.faults.points import PLACES, Strike
from tests.faults.reader import Reader
from tests.faults.stage import Stage, wait_at_most
from tests.faults.strikes import strike
from tests.servers import PostgresServer

_END_SECONDS = 120.0
_SEEN_SECONDS = 240.0  # an engine that was killed starts again
COLUMNS = tuple(field.name for field in fields(Verdict))


@dataclass(frozen=True)
class Ran:
    """One run: what was done at the point, and what came of it."""

    strike: Strike
    verdict: Verdict
    attempts: int
    answers: int
    refused: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.strike}: {self.seconds:.1f} s, {self.attempts} attempts,"
            f" {self.answers} answers, {self.refused} refused"
        )


def strikes_at(place: str, postgres: bool) -> tuple[Strike, ...]:
    """Those that can be done: connections are ended where the database is a server."""
    return tuple(s for s in PLACES[place].strikes if postgres or s != "database")


def run(stage: Stage, name: str, turn: int) -> Ran:
    """One run at a place; ``turn`` chooses among its strikes.

    Raises:
        ShowsNothing: there was nothing to strike, or to see.
    """
    place, started = PLACES[name], time.monotonic()
    possible = strikes_at(name, stage.sql.dialect.name == "postgresql")
    how = possible[turn % len(possible)]
    stage.runs += 1
    endpoint = f"{name}-{stage.runs}"
    version = prepare(stage, place.act, endpoint)
    with Reader(stage.service.url, endpoint) as reader, ThreadPoolExecutor(1) as pool:
        try:
            if not wait_at_most(_SEEN_SECONDS, lambda: bool(reader.answers)):
                raise ShowsNothing(f"no answer of {endpoint} in {_SEEN_SECONDS:g} s, unstruck")
            stage.arm(place.point, place.passes)
            if place.also is not None:
                stage.arm(place.also, 0)
            asked = pool.submit(perform, stage, place.act, endpoint, version)
            strike(stage, how, stage.held(place.point), endpoint)
            acted = asked.result()
        finally:
            stage.let_go()
        attempts = _wait_for_the_end(stage, endpoint, acted, reader)
    verdict = judge(stage, endpoint, acted, reader, may_fail=how == "disk" and not stage.mounted)
    seconds = time.monotonic() - started
    return Ran(how, verdict, attempts, len(reader.answers), reader.refused, seconds)


def _wait_for_the_end(stage: Stage, endpoint: str, acted: Acted, reader: Reader) -> int:
    """Until the job has ended and the reader has seen the last move, if that ever comes; the number
    of attempts."""
    job: dict[str, Any] = {}
    if acted.job is not None:
        path = f"/v1/jobs/{acted.job}"
        gone = {"status": "gone"}  # a job that is not there has none
        wait_at_most(
            _END_SECONDS,
            lambda: (gone | stage.insist("GET", path).body)["status"] in (*ENDED, "gone"),
        )
        job = stage.insist("GET", path).body
    shown = stage.insist("GET", f"/v1/endpoints/{endpoint}").body
    wait_at_most(_SEEN_SECONDS, lambda: reader.has_seen(shown.get("generation", 0)))
    return len(job.get("attempts", ()))


def main(
    runs: Annotated[int, typer.Option(min=1, help="Runs a point.")] = 20,
    points: Annotated[str, typer.Option(help="By commas; all by default.")] = "",
    database: Annotated[
        str,
        typer.Option(help="`postgres` (one is started) or an empty one's URL; SQLite by default."),
    ] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Where figures go.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Count on from what --json holds.")
    ] = False,
) -> None:
    """Strike a running service at every point, and count the promises that break.

    Example: python -m tests.faults.matrix --runs 2 --points claimed,made --json faults.json
    """
    chosen = [name.strip() for name in points.split(",") if name.strip()] or list(PLACES)
    unknown = sorted(set(chosen) - set(PLACES))
    if unknown:
        raise typer.BadParameter(f"no points: {', '.join(unknown)}; there are {', '.join(PLACES)}")
    console = Console(highlight=False, soft_wrap=True)
    counts: dict[str, Counter[str]] = {name: Counter() for name in chosen}
    shown_nothing = 0
    if resume and json_file is not None and json_file.exists():
        counts |= {name: Counter(row) for name, row in _read(json_file).items()}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="errata-faults-"))
        if database == "postgres":
            server = stack.enter_context(PostgresServer())
            database = server.url(server.new_database())
        stage = stack.enter_context(Stage(Path(folder), database))
        console.print(f"disk: {'a tmpfs' if stage.mounted else 'RLIMIT_FSIZE'}")
        for turn in range(runs):
            for name in chosen:
                if counts[name]["runs"] > turn:  # an earlier one, resumed
                    continue
                told, broken = _ran(stage, name, turn)
                console.print(f"{turn + 1}/{runs} {name}, {told}")
                if broken is None:
                    shown_nothing += 1
                    continue
                counts[name].update({"runs": 1} | dict.fromkeys(broken, 1))
                if broken:
                    console.print(json.dumps(broken, indent=1, default=list), markup=False)
                    console.print(stage.service.log()[-3000:], markup=False)
                if json_file is not None:
                    json_file.write_text(json.dumps({"points": _figures(counts)}, indent=1) + "\n")
    _show(console, counts)
    if shown_nothing:
        console.print(f"{shown_nothing} runs showed nothing and are not counted")
    if shown_nothing or any(
        figures[column] for figures in _figures(counts).values() for column in COLUMNS
    ):
        sys.exit(1)


def _ran(stage: Stage, name: str, turn: int) -> tuple[str, dict[str, Sequence[str]] | None]:
    """What a run was, and what it broke, or None where it showed nothing; one that comes to no end
    has lost what it asked for."""
    try:
        ran = run(stage, name, turn)
    except ShowsNothing as error:
        return repr(error), None
    except (AssertionError, httpx.HTTPError) as error:
        return repr(error), {"lost": ["the run came to no end"]}
    return str(ran), ran.verdict.broken


def _read(json_file: Path) -> dict[str, dict[str, int]]:
    points: dict[str, dict[str, int]] = json.loads(json_file.read_text())["points"]
    return points


def _figures(counts: dict[str, Counter[str]]) -> dict[str, dict[str, int]]:
    """For each point, its runs and in how many of them each promise broke."""
    return {
        name: {column: count[column] for column in ("runs", *COLUMNS)}
        for name, count in counts.items()
    }


def _show(console: Console, counts: dict[str, Counter[str]]) -> None:
    table = Table("point", "runs", *COLUMNS)
    for name, figures in _figures(counts).items():
        table.add_row(name, *map(str, figures.values()))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
