"""``errata evaluate``: a dataset file against a version, measured in this process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from registry.bootstrap import DEFAULT_TENANT
from registry.errors import InvalidRequest
from registry.settings import Settings
from workers.offline import Target, evaluate_file


def run(
    settings: Settings,
    file: Path,
    names: Mapping[str, str | None],
    purpose: str,
    limit: int | None,
    json_file: Path | None,
) -> None:
    """Measure, print a table, and write ``{"target", "rows", "metrics"}`` to ``json_file``.

    Raises:
        InvalidRequest: not exactly one of ``names`` is given, a file cannot be read or written.
    """
    chosen = [Target(kind, name) for kind, name in names.items() if name is not None]
    if len(chosen) != 1:
        raise InvalidRequest("give exactly one of --version, --endpoint and --base")
    if not file.is_file():
        raise InvalidRequest(f"{file} is not a file")
    console = Console(highlight=False)
    with console.status("reading") as status, file.open("rb") as stream:
        found = evaluate_file(
            settings, DEFAULT_TENANT, chosen[0], purpose, stream, limit, status.update
        )
    console.print(_table(found))
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n")


def _table(found: Mapping[str, Any]) -> Table:
    metrics = found["metrics"]
    columns = [name for name in ("before", "after") if name in metrics]
    heads = {"before": "untouched base", "after": found["target"]}
    title = f"{found['target']} on {found['rows']} {found['purpose']}"
    table = Table("metric", *(heads[c] for c in columns), title=title, title_justify="left")
    for name in sorted(set().union(*(metrics[c] for c in columns))):
        values = [metrics[c].get(name) for c in columns]
        table.add_row(name, *("" if value is None else f"{value:.4f}" for value in values))
    return table
