from registry import attempts, endpoints, jobs
from registry.counts import Counts, read_counts
from registry.database import Database
from registry.manifests import GuardResult
from registry.moves import Target
from registry.results import Result
from tests.unit.registry.conftest import TENANT, add_version
from tests.unit.registry.test_jobs import begin, finish, made_by, submit


def counted(database: Database) -> Counts:
    with database.read() as connection:
        return read_counts(connection)


def test_nothing_is_counted_where_nothing_was(database: Database) -> None:
    assert counted(database) == Counts({}, None, 0, {}, {})


def test_what_happened_is_counted(database: Database) -> None:
    version = add_version(database)
    with database.write() as connection:
        endpoints.create_endpoint(connection, TENANT, "facts", (Target(version.id),), actor="t")
    first, second = submit(database, "facts"), submit(database, "facts")
    assert counted(database).oldest_due == first.created_at
    begin(database, first)
    assert counted(database).oldest_due is None, "the second waits for the first"
    with database.write() as connection:
        attempts.release(connection, first.id, 1, 5)
    claim = begin(database, first, 2)
    finish(database, claim, made_by(claim, "d" * 64))
    claim = begin(database, second)
    guards = tuple(GuardResult(name, "failed", 2.0, 1.1) for name in ("norm", "perplexity"))
    made = made_by(claim, "e" * 64)
    finish(database, claim, Result(made.manifest, {}, guards))
    found = counted(database)
    assert found.jobs == {("edit", jobs.SUCCEEDED): 1, ("edit", jobs.FAILED): 1}
    assert found.lost_attempts == 1
    assert found.rejections == {"norm": 1, "perplexity": 1}
    assert found.moves == {"create": 1, "activate": 1}
