"""The SQL database: SQLite embedded, PostgreSQL by URL. Transactions are short, none across an
await."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from sqlalchemy import URL, Connection, Engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from registry import postgres, sqlite
from registry.errors import Conflict, InvalidRequest, NotFound, Unavailable
from registry.momentary import reason
from registry.schema import knows_schema, newest_schema, schema_of, upgrade
from registry.signing import SigningKey, Trust
from registry.waiting import wait_for

T = TypeVar("T")
_DRIVERS: dict[str, ModuleType] = {
    "sqlite": sqlite,
    "sqlite+pysqlite": sqlite,
    "postgresql": postgres,
    "postgresql+psycopg": postgres,
}
_AGAIN_SECONDS = 1.0
#: Where no signature is asked for.
EVERYBODY = Trust()


class Database:
    """A pool of connections and the two kinds of transaction.

    What fails because the database is away for the moment raises Unavailable, from any transaction
    and at any statement of it; a commit that raises it may have been done.

    Args:
        trust: whose signatures count for versions that are used through this database.
        signer: the key that signs the versions that are made through it.

    Raises:
        InvalidRequest: the URL is none, or of a database that this service does not work with.
    """

    def __init__(
        self, url: str, trust: Trust = EVERYBODY, signer: SigningKey | None = None
    ) -> None:
        self.trust = trust
        self._url = _parsed(url)
        self._backend = _DRIVERS[self._url.drivername]
        self._engine: Engine = self._backend.open_engine(self._url)
        signing = {"errata_trust": trust, "errata_signer": signer}
        self._reader = self._engine.execution_options(**self._backend.READER, **signing)
        self._writer = self._engine.execution_options(**self._backend.WRITER, **signing)

    def __str__(self) -> str:
        shown = {name: value for name, value in self._url.query.items() if name == "host"}
        return f"the database {self._url.set(query=shown).render_as_string(hide_password=True)}"

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads: one snapshot."""
        with self._told(), self._reader.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may write: from its start it is the only one of its kind."""
        with self._told(), self._writer.begin() as connection:
            yield connection

    def check(self) -> None:
        """Take a transaction that writes, and write nothing. Raises Unavailable."""
        with self.write() as connection:
            connection.exec_driver_sql("UPDATE tenants SET id = id WHERE 1 = 0")

    def insist(self, action: Callable[[Connection], T], seconds: float) -> T:
        """``action`` in a writing transaction, again while the database is away.

        The answer to a commit may be lost, so an action must find out whether it was done before:
        what an attempt writes under its fence does.

        Raises:
            Unavailable: it was away for so many seconds.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                with self.write() as connection:
                    return action(connection)
            except Unavailable:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(min(_AGAIN_SECONDS, seconds))

    def wait(self, seconds: float) -> None:
        """Wait until the database answers.

        Raises:
            Unavailable: it did not for so many seconds.
            InvalidRequest: it does, and does not let this service in.
        """
        wait_for(str(self), self._answer, seconds)

    def migrate(self) -> None:
        """Bring the schema to the newest revision; safe when several processes start at once."""
        with self.write() as connection:
            upgrade(connection)

    def close(self) -> None:
        self._engine.dispose()

    def _answer(self) -> None:
        try:
            self._ask()
        except Unavailable:
            if not self._backend.refuses(self._url):
                raise
            try:
                self._ask()  # it may have come up between the two
            except Unavailable as error:
                if self._backend.is_full(error):
                    raise
                raise self._refused(error) from error
        except DBAPIError as error:
            raise self._refused(error.orig or error) from error

    def _ask(self) -> None:
        with self.read() as connection:
            connection.execute(text("SELECT 1"))

    def _refused(self, error: BaseException) -> InvalidRequest:
        return InvalidRequest(
            f"{self} cannot be used: {reason(error)}; ERRATA_DATABASE_URL (or ERRATA_DATA) must"
            " name one that this service may open, with its user and password",
            param="ERRATA_DATABASE_URL",
        )

    @contextmanager
    def _told(self) -> Iterator[None]:
        """The driver's errors as the service's own."""
        try:
            yield
        except PoolTimeout as error:
            raise _away() from error
        except DBAPIError as error:
            if self._backend.is_away(error):
                raise _away() from (error.orig or error)
            if isinstance(error, DataError):
                raise InvalidRequest(
                    f"a value is none that the database can hold: {reason(error.orig or error)}"
                ) from error
            raise


def trust_of(connection: Connection) -> Trust:
    """Whose signatures count on a connection."""
    trust: Trust = connection.get_execution_options().get("errata_trust", EVERYBODY)
    return trust


def signer_of(connection: Connection) -> SigningKey | None:
    """The key that signs what is made on a connection, if there is one."""
    signer: SigningKey | None = connection.get_execution_options().get("errata_signer")
    return signer


@contextmanager
def existing_database(url: str) -> Iterator[Database]:
    """The database of a service that has run; it is not made where there is none.

    Raises:
        NotFound: there is none, or no service ever ran on it.
        Conflict: it has the tables of an older errata.
        Unavailable: it does not answer. InvalidRequest: it does not let this program in.
    """
    parsed = _parsed(url)
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").is_file():
        raise NotFound(
            f"{parsed.database} does not exist: ERRATA_DATA must name the data folder of a service"
            " that has run"
        )
    database = Database(url)
    try:
        database.wait(0)
        _check_schema(database)
        yield database
    finally:
        database.close()


def _check_schema(database: Database) -> None:
    """Raises NotFound, Conflict: the tables are missing, or of an older errata."""
    with database.read() as connection:
        schema, newest = schema_of(connection), newest_schema()
    if schema is None:
        raise NotFound(
            f"{database} has no tables: ERRATA_DATABASE_URL (or ERRATA_DATA) must name the one of a"
            " service that has run"
        )
    if schema != newest and knows_schema(schema):
        raise Conflict(
            f"{database} has schema {schema}, this errata {newest}: use the errata that the service"
            " runs on, or start the service once with this one"
        )


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:  # ValueError: of the port
        raise _unknown("is not a database's URL") from error
    if parsed.drivername not in _DRIVERS:
        raise _unknown(f"begins with {parsed.drivername!r}")
    return parsed


def _unknown(what: str) -> InvalidRequest:
    return InvalidRequest(
        f"ERRATA_DATABASE_URL {what}; it must be"
        " postgresql+psycopg://USER:PASSWORD@HOST:PORT/DATABASE, or sqlite:////PATH, or empty for"
        " SQLite in the data folder",
        param="ERRATA_DATABASE_URL",
    )


def _away() -> Unavailable:
    return Unavailable("the database does not answer at the moment; try again", retry_after=1)
