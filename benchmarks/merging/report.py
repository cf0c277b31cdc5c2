"""What the bench found, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks.editing.report import number
from benchmarks.merging import edits, tasks
from benchmarks.merging.workload import RELATIONS


def tables(figures: Mapping[str, float], detail: Mapping[str, Any]) -> Iterator[Table]:
    """The figures, and a row a method of each part."""
    shown = Table("", "", title="Figures")
    for name, value in figures.items():
        shown.add_row(name.replace("_", " "), f"{value:.4g}")
    yield shown
    if "tasks" in detail:
        columns = {**{name: name for name in RELATIONS}, **tasks.COLUMNS}
        yield _rows("Versions that each learnt another relation", columns, detail["tasks"])
    if "edits" in detail:
        found = detail["edits"]
        own = " and ".join(f"{score:.3f}" for score in found["own"])
        title = f"Two sets of {found['count']} edits by {found['editor']}, S of their own {own}"
        yield _rows(title, edits.COLUMNS, found["rows"])
    if "identity" in detail:
        title = "One version at weight 1"
        yield _rows(title, {"error": "largest difference"}, detail["identity"]["rows"])
    if "exchange" in detail:
        columns = {"base": "base", "change": "largest change of a logit", "difference": "peft's"}
        yield _rows("Exported to peft", columns, detail["exchange"])


def _rows(title: str, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> Table:
    shown = Table("", *columns.values(), title=title)
    for row in rows:
        found: dict[str, Any] = {name: row.get(name) for name in columns}
        if found.get("peak_memory") is not None:
            found["peak_memory"] /= 1e6
        cells = [value if isinstance(value, str) else number(value) for value in found.values()]
        shown.add_row(row["method"], *cells)
    return shown
