"""PostgreSQL, by psycopg: writers take turns, readers have one snapshot, dead servers are noticed.

What is written relies on what SQLite gives: one writer at a time, who sees all that was committed
before. Here a lock that each takes first gives the turns (``pg_advisory_xact_lock``, until the
transaction ends): every statement after it, in READ COMMITTED, sees what writers before have left.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, OperationalError

#: "errata" in ASCII.
_LOCK = 0x657272617461
#: A turn that does not come within the first is an error; a writer that stands still for the second
#: (its process is stopped, its machine gone) loses its turn.
_BEGIN = (
    "SELECT set_config('lock_timeout', '30s', true),"
    " set_config('idle_in_transaction_session_timeout', '60s', true),"
    f" pg_advisory_xact_lock({_LOCK})"
)
_WRITES = "errata_write"
_FULL = re.compile("too many clients|too many connections|connection slots|no more connections")
READER: dict[str, Any] = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
WRITER: dict[str, Any] = {"isolation_level": "READ COMMITTED", _WRITES: True}

#: How a server that is gone without a word is noticed, in seconds; the URL may say otherwise.
_CONNECTING: dict[str, Any] = {
    "application_name": "errata",
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,  # milliseconds
}


def open_engine(url: URL) -> Engine:
    """An engine whose connections are tried before they are used.

    Statements are not kept prepared: a migration beside a running service would spoil them.
    """
    given = {name: value for name, value in _CONNECTING.items() if name not in url.query}
    engine = create_engine(
        url,
        pool_pre_ping=True,
        hide_parameters=True,
        connect_args={**given, "prepare_threshold": None},
    )
    event.listen(engine, "begin", _begin)
    return engine


def is_away(error: DBAPIError) -> bool:
    """Whether what failed may succeed in a moment: the server or its room was not there."""
    return isinstance(error, OperationalError) or error.connection_invalidated


def is_full(error: Exception) -> bool:
    """Whether a server, a database or a role had no connection left (SQLSTATE 53300).

    By the words alone: what refuses a connection gives psycopg no code.
    """
    return _FULL.search(str(error.__cause__ or error)) is not None


def refuses(url: URL) -> bool:
    """Whether a server is there and open, so that one who cannot connect is not let in."""
    pq: Any = import_module("psycopg.pq")
    conninfo: Any = import_module("psycopg.conninfo")
    _, parameters = create_engine(url).dialect.create_connect_args(url)
    parameters.pop("context", None)  # SQLAlchemy's adapters, no option of the connection
    text = conninfo.make_conninfo(**{"connect_timeout": 5, **parameters})
    answer = pq.PGconn.ping(text.encode())
    return answer in (pq.Ping.OK, pq.Ping.NO_ATTEMPT)


def _begin(connection: Connection) -> None:
    if connection.get_execution_options().get(_WRITES, False):
        connection.exec_driver_sql(_BEGIN)
