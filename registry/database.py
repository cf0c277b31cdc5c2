"""The SQL database: SQLite embedded, any other by URL. Short transactions, none across an await."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url

from registry.errors import NotFound


class Database:
    """A pool of connections and the two kinds of transaction.

    SQLite runs with journal_mode=DELETE and synchronous=FULL: a commit that returned survives a
    crash, and the write-ahead log's reset fault of older library versions is not met.
    """

    def __init__(self, url: str) -> None:
        self._url = make_url(url)
        self._sqlite = self._url.get_backend_name() == "sqlite"
        if self._sqlite and self._url.database:
            Path(self._url.database).parent.mkdir(parents=True, exist_ok=True)
        self._engine: Engine = create_engine(self._url)
        if self._sqlite:
            event.listen(self._engine, "connect", _configure_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads: one snapshot."""
        with self._engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may write; on SQLite it holds the write lock from its start."""
        engine = self._engine.execution_options(errata_write=True)
        with engine.begin() as connection:
            yield connection

    def migrate(self) -> None:
        """Bring the schema to the newest revision; safe when several processes start at once."""
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with self.write() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def close(self) -> None:
        self._engine.dispose()


@contextmanager
def existing_database(url: str) -> Iterator[Database]:
    """The database of a service that has run; it is not made where there is none.

    Raises:
        NotFound: there is none.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").is_file():
        raise NotFound(
            f"{parsed.database} does not exist: ERRATA_DATA must name the data folder of a service"
            " that has run"
        )
    database = Database(url)
    try:
        yield database
    finally:
        database.close()


def _configure_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # transactions begin where _begin_sqlite says
    cursor = connection.cursor()
    for pragma in ("journal_mode=DELETE", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.execute("PRAGMA busy_timeout=30000")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    write = connection.get_execution_options().get("errata_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
