from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, insert, select, text

from registry import tables
from registry.database import Database
from registry.database import existing_database as existing
from registry.errors import Conflict, InvalidRequest, NotFound, Unavailable
from registry.schema import upgrade
from registry.tables import metadata
from tests.servers import PostgresServer

MIGRATIONS = Path(__file__).parents[3] / "registry" / "migrations"
LARGE = 3 * 2**40


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database without a schema."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'registry.db'}"
    postgres: PostgresServer = request.getfixturevalue("postgres")
    return postgres.url(postgres.new_database())


def add_tenant(connection: Connection, name: str) -> None:
    connection.execute(insert(tables.tenants).values(id=name, created_at=0.0))


def tenants(connection: Connection) -> list[str]:
    return sorted(connection.execute(select(tables.tenants.c.id)).scalars())


def ask(connection: Connection) -> int:
    return int(connection.execute(text("SELECT 1")).scalar_one())


def test_the_migrations_make_the_tables(database: Database) -> None:
    with database.read() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, metadata) == []


def test_the_migrations_lead_back(database: Database) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with database.write() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    database.migrate()
    with database.read() as connection:
        assert tenants(connection) == []


def test_several_processes_may_migrate_at_once(empty: str) -> None:
    databases = [Database(empty) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(Database.migrate, databases))
    with databases[0].read() as connection:
        assert connection.execute(text("SELECT count(*) FROM jobs")).scalar_one() == 0
    for one in databases:
        one.close()


def test_a_commit_survives_a_crash_by_its_settings(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'registry.db'}")
    with database.read() as connection:
        mode = connection.execute(text("PRAGMA journal_mode")).scalar_one()
        synchronous = connection.execute(text("PRAGMA synchronous")).scalar_one()
    database.close()
    assert (mode, synchronous) == ("delete", 2)  # 2: FULL


def test_writers_take_turns(database: Database) -> None:
    """Each reads, then writes what follows from that: none misses what another wrote."""
    start = Barrier(4)

    def add_ten(worker: int) -> None:
        start.wait()
        for _ in range(10):
            with database.write() as connection:
                add_tenant(connection, f"{len(tenants(connection)):03}-{worker}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add_ten, range(4)))
    with database.read() as connection:
        assert [int(name.split("-")[0]) for name in tenants(connection)] == list(range(40))


def test_a_reader_sees_one_moment(database: Database) -> None:
    reading, written = Event(), Event()

    def write() -> None:
        reading.wait()
        with database.write() as connection:
            add_tenant(connection, "late")

    def read() -> tuple[list[str], list[str]]:
        with database.read() as connection:
            first = tenants(connection)
            reading.set()
            written.wait(0.5)  # SQLite's writer waits for its readers
            return first, tenants(connection)

    with ThreadPoolExecutor(2) as pool:
        seen, done = pool.submit(read), pool.submit(write)
        done.add_done_callback(lambda _: written.set())
        assert seen.result() == ([], [])
        done.result()
    with database.read() as connection:
        assert tenants(connection) == ["late"]


def test_what_is_large_is_held(database: Database) -> None:
    with database.write() as connection:
        connection.execute(
            insert(tables.files).values(
                id="file-1",
                tenant="t",
                filename="f",
                purpose="texts",
                size=LARGE,
                content="",
                rows="",
                row_count=1,
                created_at=0.0,
            )
        )
    with database.read() as connection:
        assert connection.execute(select(tables.files.c.size)).scalar_one() == LARGE


@pytest.mark.parametrize(
    "url",
    [
        "nonsense",
        "postgres://u@h/d",
        "postgresql+psycopg2://u@h/d",
        "postgresql+asyncpg://u@h/d",
        "mysql://u@h/d",
        "postgresql://u@h:port/d",
        "sqlite+aiosqlite:////x.db",
    ],
)
def test_a_url_that_cannot_work_is_refused_with_the_cure(url: str) -> None:
    with pytest.raises(InvalidRequest, match=r"must be postgresql\+psycopg://USER"):
        Database(url)


def test_a_server_that_lets_nobody_in_is_not_waited_for(postgres: PostgresServer) -> None:
    url = postgres.url()
    for wrong, told in (
        (url.replace("errata@", "eve:secret@"), 'role "eve" does not exist'),
        (postgres.url("nowhere"), 'database "nowhere" does not exist'),
        (f"{url}&colour=red", 'invalid connection option "colour"'),
    ):
        with pytest.raises(InvalidRequest, match=told) as refused:
            Database(wrong).wait(600)
        assert "secret" not in refused.value.message


def test_a_file_that_cannot_be_opened_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "registry.db").mkdir()
    with pytest.raises(InvalidRequest, match="unable to open database file"):
        Database(f"sqlite:///{tmp_path / 'registry.db'}").wait(600)
    with (
        pytest.raises(NotFound, match="does not exist"),
        existing(f"sqlite:///{tmp_path / 'none.db'}"),
    ):
        raise AssertionError


def test_a_database_on_which_no_service_ran_is_not_used(empty: str) -> None:
    database = Database(empty)
    database.wait(0)
    with pytest.raises(NotFound, match="has no tables: ERRATA_DATABASE_URL"), existing(empty):
        raise AssertionError
    with database.write() as connection:
        upgrade(connection, "0009")
    with pytest.raises(Conflict, match="has schema 0009, this errata"), existing(empty):
        raise AssertionError
    database.migrate()
    database.close()
    with existing(empty) as found, found.read() as connection:
        assert tenants(connection) == []


def test_no_connection_left_is_waited_for(postgres: PostgresServer) -> None:
    postgres.ask("CREATE ROLE frugal LOGIN CONNECTION LIMIT 1")
    url = postgres.url().replace("errata@", "frugal@")
    first, second = Database(url), Database(url)
    with ThreadPoolExecutor(1) as pool:
        with first.read():
            with pytest.raises(
                Unavailable, match=r"did not answer for 0\.2 s.*too many connections"
            ):
                second.wait(0.2)
            waiting = pool.submit(second.wait, 60)
        first.close()
        waiting.result()
    second.close()


@pytest.fixture(scope="module")
def unruly() -> Iterator[PostgresServer]:
    """A server that tests stop and start."""
    with PostgresServer() as server:
        yield server


def test_a_server_that_starts_late_is_waited_for(
    unruly: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    unruly.stop()
    database = Database(unruly.url())
    with pytest.raises(Unavailable, match=r"did not answer for 0\.2 s: .*; start it"):
        database.wait(0.2)
    with (
        pytest.raises(Unavailable, match=r"does not answer: .*; start it, and try again"),
        existing(unruly.url()),
    ):
        raise AssertionError
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(database.wait, 60)
        with pytest.raises(TimeoutError):
            waiting.result(0.6)
        unruly.start()
        waiting.result()
    database.close()
    assert "waiting for the database postgresql+psycopg://errata@" in caplog.text


@pytest.mark.parametrize("how", ["restarted", "crashed", "ended"])
def test_a_server_that_goes_away_is_found_again(unruly: PostgresServer, how: str) -> None:
    name = unruly.new_database()
    database = Database(unruly.url(name))
    database.migrate()
    ways: dict[str, Callable[[], object]] = {
        "restarted": unruly.stop,
        "crashed": unruly.crash,
        "ended": lambda: unruly.end_connections(name),
    }

    def interrupted() -> None:
        with database.write() as connection:
            add_tenant(connection, "lost")
            ways[how]()

    with pytest.raises(Unavailable, match="try again"):
        interrupted()
    if how != "ended":
        with pytest.raises(Unavailable), database.read() as connection:
            ask(connection)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(database.insist, ask, 60.0)
            unruly.start()
            assert asked.result() == 1
    with database.read() as connection:
        assert tenants(connection) == []
    database.close()


def test_a_value_that_the_database_cannot_hold_is_the_asker_s_fault(
    postgres: PostgresServer, migrated: str
) -> None:
    database = Database(postgres.url(postgres.new_database(migrated)))
    with (
        pytest.raises(InvalidRequest, match="cannot contain NUL"),
        database.write() as connection,
    ):
        add_tenant(connection, "a\0b")
    database.close()


def test_a_file_without_room_is_unavailable(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'registry.db'}")
    database.migrate()

    def fill() -> None:
        with database.write() as connection:
            pages = connection.execute(text("PRAGMA page_count")).scalar_one()
            connection.execute(text(f"PRAGMA max_page_count={pages}"))
            for number in range(1000):
                add_tenant(connection, f"{number}")

    with pytest.raises(Unavailable) as told:
        fill()
    assert "full" in str(told.value.__cause__)
    database.close()


def test_a_lock_that_is_not_given_back_is_unavailable(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'registry.db'}"
    first, second = Database(url), Database(url)
    first.migrate()
    with second.read() as connection:
        connection.execute(text("PRAGMA busy_timeout=50"))
    with first.write(), pytest.raises(Unavailable) as told, second.write():
        raise AssertionError
    assert "locked" in str(told.value.__cause__)
    first.close()
    second.close()


def test_a_writer_that_stands_still_loses_its_turn_by_its_settings(
    postgres: PostgresServer,
) -> None:
    database = Database(postgres.url())
    with database.write() as connection:
        held = postgres.ask("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")
        shown = [
            connection.execute(text(f"SHOW {name}")).scalar_one()
            for name in ("lock_timeout", "idle_in_transaction_session_timeout")
        ]
    database.close()
    assert (held, shown) == (1, ["30s", "1min"])
