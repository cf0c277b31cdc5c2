"""The audit log grows with every change, in the change's own transaction, and never changes."""

import pytest
from sqlalchemy import delete, update
from sqlalchemy.exc import DBAPIError

from registry import audit, jobs, tables
from registry.database import Database
from registry.endpoints import create_endpoint
from registry.moves import Target
from tests.unit.registry.conftest import TENANT, add_version


def actions(database: Database, **query: str) -> list[str]:
    with database.read() as connection:
        return [entry.action for entry in audit.entries(connection, TENANT, **query).items]


def test_what_is_done_to_a_job_a_file_and_an_endpoint(database: Database) -> None:
    version = add_version(database, "a" * 64)
    with database.write() as connection:
        job = jobs.submit_job(connection, TENANT, "edit", base="atlas", request={}, actor="bob")
        jobs.pause_job(connection, TENANT, job.id, actor="ada")
        jobs.resume_job(connection, TENANT, job.id, actor="ada")
        jobs.cancel_job(connection, TENANT, job.id, actor="ada")
        create_endpoint(connection, TENANT, "line", (Target(version.id),), actor="bob")
    assert actions(database, object=job.id) == [
        "job.cancel",
        "job.resume",
        "job.pause",
        "job.submit",
    ]
    assert actions(database, actor="bob") == ["endpoint.create", "job.submit"]
    with database.read() as connection:
        (made,) = audit.entries(connection, TENANT, object="line").items
        assert (made.before, made.after) == (None, [{"version": version.id, "weight": 1.0}])
        assert audit.entries(connection, "another").items == ()


def test_a_change_that_is_taken_back_leaves_no_entry(database: Database) -> None:
    def submitted_and_taken_back() -> None:
        with database.write() as connection:
            jobs.submit_job(connection, TENANT, "edit", base="atlas", request={}, actor="bob")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        submitted_and_taken_back()
    assert actions(database) == []


def test_an_entry_is_neither_changed_nor_deleted(database: Database) -> None:
    with database.write() as connection:
        jobs.submit_job(connection, TENANT, "edit", base="atlas", request={}, actor="bob")
    for change in (update(tables.audit).values(actor="eve"), delete(tables.audit)):
        with pytest.raises(DBAPIError, match="only be added to"), database.write() as connection:
            connection.execute(change)
    assert actions(database, actor="bob") == ["job.submit"]
