"""The clock by which leases run: one for all machines that share a database."""

from __future__ import annotations

import time

from sqlalchemy import Connection, func, select


def now(connection: Connection) -> float:
    """The moment, in Unix seconds: the server's, so that machines whose clocks differ agree; on
    SQLite, which one machine has for itself, this machine's."""
    if connection.dialect.name == "sqlite":
        return time.time()
    moment = select(func.extract("epoch", func.clock_timestamp()))
    return float(connection.execute(moment).scalar_one())
