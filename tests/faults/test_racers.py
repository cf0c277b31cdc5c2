"""Eight processes move one endpoint: each generation has one winner, and history leads to the
pointer."""

from pathlib import Path
from queue import SimpleQueue
from threading import Barrier

import pytest

from tests.faults.racers import _run, race
from tests.servers import PostgresServer

MOVES = 60


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_each_generation_has_one_winner(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    url = f"sqlite:///{tmp_path / 'registry.db'}"
    if kind == "postgresql":
        postgres: PostgresServer = request.getfixturevalue("postgres")
        url = postgres.url(postgres.new_database())
    outcome = race(url, MOVES)
    assert outcome.winners == {1: outcome.won}
    assert outcome.won == outcome.generation - 1
    assert outcome.won + outcome.refused == outcome.moves == 8 * MOVES
    assert outcome.won >= MOVES
    assert outcome.replays


def test_a_racer_that_breaks_off_is_not_waited_for(tmp_path: Path) -> None:
    won: SimpleQueue[list[int]] = SimpleQueue()
    with pytest.raises(Exception, match="no such table"):
        _run(f"sqlite:///{tmp_path / 'empty.db'}", "ver_", 1, Barrier(1), won)
    assert won.get_nowait() == []
