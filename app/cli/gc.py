"""``errata gc``: what nothing reaches is deleted, by this process."""

from __future__ import annotations

from rich.console import Console

from registry.database import existing_database
from registry.garbage import Collector
from registry.settings import Settings
from registry.stores import open_store


def run(settings: Settings, grace: float | None, dry_run: bool, adopt: bool) -> None:
    """Delete artifacts that nothing reaches, or count them.

    Raises:
        Conflict: they are another registry's, and are not to be adopted.
    """
    grace = settings.gc_grace_seconds if grace is None else grace
    with existing_database(settings.sql_url) as database:
        store = open_store(settings)
        swept = Collector(database, store).collect(grace, dry_run=dry_run, adopt=adopt)
    done = "would be deleted" if dry_run else "deleted"
    Console(highlight=False).print(
        f"{swept.count} artifacts of {swept.size:,} bytes {done}: nothing reaches them, and nobody"
        f" put them in the last {grace:g} s"
    )
