"""The embedded database: a file, with a lock that gives writers their turns."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError

#: Primary result codes of what passes: locked, no room, a file system that is away.
_MOMENTARY = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
    }
)
_WRITES = "errata_write"
READER: dict[str, Any] = {}
WRITER: dict[str, Any] = {_WRITES: True}


def open_engine(url: URL) -> Engine:
    """An engine with journal_mode=DELETE and synchronous=FULL: a commit that returned survives a
    crash, and the write-ahead log's reset fault of older library versions is not met."""
    if url.database:
        Path(url.database).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = create_engine(url, hide_parameters=True)
    event.listen(engine, "connect", _configure)
    event.listen(engine, "begin", _begin)
    return engine


def is_away(error: DBAPIError) -> bool:
    """Whether what failed may succeed in a moment."""
    code = getattr(error.orig, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in _MOMENTARY


def refuses(_url: URL) -> bool:
    """A file that cannot be opened is not waited for."""
    return True


def is_full(_error: Exception) -> bool:
    """A file has no number of connections."""
    return False


def _configure(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # transactions begin where _begin says
    cursor = connection.cursor()
    for pragma in ("journal_mode=DELETE", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.execute("PRAGMA busy_timeout=30000")
    cursor.close()


def _begin(connection: Connection) -> None:
    write = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
