"""Every point of the kill matrix is struck twice; ``make faults`` does so twenty times."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from registry.failpoints import Point
from tests.faults.matrix import run
from tests.faults.points import PLACES
from tests.faults.stage import Stage

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with (
        tempfile.TemporaryDirectory(prefix="errata-faults-") as folder,
        Stage(Path(folder)) as made,
    ):
        yield made


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("place", PLACES)
def test_no_promise_breaks(stage: Stage, place: str, turn: int) -> None:
    ran = run(stage, place, turn)
    assert not ran.verdict.broken, f"{ran}\n{ran.verdict}\n{stage.service.log()[-3000:]}"


def test_every_point_of_the_code_is_struck() -> None:
    assert {place.point for place in PLACES.values()} == set(get_args(Point))
