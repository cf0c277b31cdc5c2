"""``errata export``: a version written into a folder, by this process."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from registry.bootstrap import DEFAULT_TENANT
from registry.settings import Settings
from workers.offline import export_version


def run(
    settings: Settings, version: str, form: str, output: Path, rank: int, round_rank: bool
) -> None:
    """Write a version into a folder and say what it does not hold."""
    console = Console(highlight=False)
    asked = {"format": form, "rank": rank, "round_rank": round_rank}
    with console.status("reading") as status:
        report = export_version(settings, DEFAULT_TENANT, version, asked, output, status.update)
    console.print(f"{version} as {form} in {output}")
    if "residual_energy" in report:
        console.print(f"share of the change that is left out: {report['residual_energy']:.3g}")
