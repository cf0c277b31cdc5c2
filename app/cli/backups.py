"""``errata backup`` and ``errata restore``, by this process, whether or not a service runs."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from registry.backing_up import take_backup
from registry.backups import Backups
from registry.bases import find_bases
from registry.database import Database, existing_database
from registry.errors import ErrataError
from registry.restoring import restore_backup
from registry.settings import Settings
from registry.stores import open_store


def take(settings: Settings, folder: Path, keep: int | None) -> None:
    """Take one; then delete all but the newest ``keep``."""
    console = Console(highlight=False, soft_wrap=True)
    backups, store = Backups(folder), open_store(settings)
    with (
        existing_database(settings.sql_url) as database,
        backups.locked(write=True),
        console.status("reading") as status,
    ):
        taken = take_backup(database, store, backups, status.update)
        swept = None if keep is None else backups.keep(keep)
    made = taken.backup
    rows = sum(table.rows for table in made.tables.values())
    console.print(
        f"{made.name}: {rows} rows and {made.artifacts.rows} artifacts, {taken.copied} of them new"
    )
    if swept is not None:
        console.print(f"{swept.count} artifacts of older backups deleted, {swept.size:,} bytes")


def check(folder: Path) -> None:
    """Read every backup of a folder and compare it with its digests."""
    console = Console(highlight=False, soft_wrap=True)
    backups = Backups(folder)
    with backups.locked(write=False):
        names = backups.names() or [backups.read().name]
        for name in names:
            made = backups.read(name)
            backups.verify(made)
            console.print(f"{name}: whole, {made.artifacts.rows} artifacts")


def restore(settings: Settings, folder: Path, name: str | None, adopt: bool) -> None:
    """Restore a backup, the newest by default, into the empty registry of the settings."""
    console = Console(highlight=False, soft_wrap=True)
    backups = Backups(folder)
    with backups.locked(write=False):
        chosen = backups.read(name)
        database = Database(settings.sql_url)
        try:
            with console.status("reading") as status:
                store = open_store(settings)
                restore_backup(backups, chosen, database, store, status.update, adopt=adopt)
        finally:
            database.close()
    console.print(f"{chosen.name} restored: {chosen.artifacts.rows} artifacts")
    found = _digests(settings)
    for base in chosen.bases:
        if found.get(base.name) != base.digest:
            console.print(
                f"base {base.name!r} with digest {base.digest[:12]}… is not among ERRATA_BASES"
                " here: until it is, its versions answer 503"
            )


def _digests(settings: Settings) -> dict[str, str]:
    try:
        return {base.name: base.digest for base in find_bases(settings.bases).values()}
    except ErrataError:
        return {}
