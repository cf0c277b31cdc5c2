"""``errata keys``: on the database itself, so that the first key can be made."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime

import typer
from rich.console import Console
from rich.table import Table

from app.schemas import NAME_PATTERN
from registry import keys
from registry.bases import find_bases
from registry.bootstrap import add_tenant, bootstrap
from registry.database import Database, existing_database
from registry.errors import UnprocessableRequest
from registry.keys import Key
from registry.settings import Settings

MOST_LISTED = 10_000
#: Whom the audit log shows.
ACTOR = "errata"
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def create(
    settings: Settings,
    name: str,
    scopes: list[str],
    tenant: str,
    expires: str | None,
    **limits: int | None,
) -> None:
    """Make a key and print it: the key alone on standard output, the rest beside it."""
    for option, value in (("NAME", name), ("--tenant", tenant)):
        if not re.match(NAME_PATTERN, value):
            raise UnprocessableRequest(f"{option} {value!r} does not match {NAME_PATTERN}")
    if not scopes or not keys.SCOPES.issuperset(scopes):
        raise UnprocessableRequest(
            f"--scope {','.join(scopes)!r}: scopes are {', '.join(sorted(keys.SCOPES))}"
        )
    seconds = None if expires is None else _seconds(expires)
    expires_at = None if seconds is None else time.time() + seconds
    bases = find_bases(settings.bases)
    database = Database(settings.sql_url)
    try:
        database.wait(0)
        bootstrap(database, bases.values())
        with database.write() as connection:
            add_tenant(connection, tenant, bases.values())
            key, token = keys.create_key(
                connection, tenant, name, set(scopes), actor=ACTOR, expires_at=expires_at, **limits
            )
    finally:
        database.close()
    Console(stderr=True, highlight=False).print(
        f"{key.id} of tenant {tenant!r}: {', '.join(sorted(key.scopes))}; expires"
        f" {_when(key.expires_at) or 'never'}. This is the only time that the key is shown:"
    )
    typer.echo(token)


def show(settings: Settings, tenant: str | None) -> None:
    """Every key there is, newest first."""
    table = Table("id", "tenant", "name", "scopes", "status", "made", "expires")
    with existing_database(settings.sql_url) as database, database.read() as connection:
        for key in keys.list_keys(connection, tenant, limit=MOST_LISTED).items:
            table.add_row(*_row(key))
    Console().print(table)


def revoke(settings: Settings, key_id: str, tenant: str) -> None:
    """Refuse a key from the next request on."""
    with existing_database(settings.sql_url) as database, database.write() as connection:
        key = keys.revoke_key(connection, tenant, key_id, actor=ACTOR)
    Console(highlight=False).print(f"{key.id} ({key.name}) is {key.status}")


def _row(key: Key) -> list[str]:
    dates = [_when(key.created_at), _when(key.expires_at) or "never"]
    return [key.id, key.tenant, key.name, ", ".join(sorted(key.scopes)), key.status, *dates]


def _when(seconds: float | None) -> str:
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def _seconds(text: str) -> int:
    found = re.fullmatch(r"([1-9][0-9]{0,5})([smhd])", text)
    if found is None:
        raise UnprocessableRequest(
            f"--expires {text!r} is not a length of time; write 90d, 12h, 30m or 60s"
        )
    return int(found[1]) * UNITS[found[2]]
