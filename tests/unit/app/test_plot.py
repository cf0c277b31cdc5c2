"""The plot of a run is well-formed XML that shows what was measured, and loads nothing."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from app.fine_tuning.plot import POINTS, draw
from registry.curves import Measured

SVG = "{http://www.w3.org/2000/svg}"


def lines_of(document: str) -> list[list[tuple[float, float]]]:
    root = ElementTree.fromstring(document)
    return [
        [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]  # type: ignore[misc]
        for line in root.iter(f"{SVG}polyline")
    ]


def test_a_curve_for_what_was_measured() -> None:
    steps = {s: {"train_loss": 5.0 - s, "learning_rate": 1e-3} for s in range(1, 5)}
    steps[4] |= {"valid_loss": 2.0}
    loss, valid, rate = lines_of(draw(steps, "birds"))
    assert len(loss) == len(rate) == 4
    assert len(valid) == 1
    assert [x for x, _ in loss] == sorted(x for x, _ in loss)
    assert [y for _, y in loss] == sorted(y for _, y in loss)  # downwards is more in SVG
    assert valid[0][0] == loss[-1][0]


def test_titles_are_escaped_and_nothing_is_loaded() -> None:
    document = draw({1: {"train_loss": 1.0}}, "<script>alert(1)</script>&")
    assert "<script" not in document
    assert not re.search(r"href|url\(|@import", document)
    title = ElementTree.fromstring(document).find(f"{SVG}title")
    assert title is not None
    assert title.text == "<script>alert(1)</script>&"


def test_long_runs_are_thinned_and_what_is_not_finite_left_out() -> None:
    steps: dict[int, Measured] = {s: {"train_loss": 1.0 / s} for s in range(1, 10_001)}
    steps[7] = {"train_loss": float("nan")}
    steps[8] = {"train_loss": None}
    (loss,) = lines_of(draw(steps, "long"))
    assert POINTS / 2 < len(loss) <= POINTS + 1
    assert loss[-1][0] == 700.0


def test_before_the_first_step() -> None:
    assert "No step was measured yet" in draw({}, "new")
