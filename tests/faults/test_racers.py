"""Eight processes move one endpoint: each generation has one winner, and history leads to the
pointer."""

from pathlib import Path

import pytest

from tests.faults.racers import race
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
