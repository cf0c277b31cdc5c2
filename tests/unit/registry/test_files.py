"""Files are their tenant's own, and stay while an unfinished job needs them."""

import pytest

from registry import files, jobs
from registry.database import Database
from registry.errors import Conflict, NotFound
from registry.files import File
from tests.unit.registry.conftest import TENANT


def add(database: Database, tenant: str = TENANT, purpose: str = "edits") -> File:
    with database.write() as connection:
        return files.add_file(
            connection,
            tenant,
            filename="a.json",
            purpose=purpose,
            size=3,
            content="0" * 64,
            rows="1" * 64,
            row_count=2,
            actor="ada",
        )


def test_a_file_is_listed_found_and_forgotten(database: Database) -> None:
    first, second = add(database), add(database, purpose="texts")
    with database.write() as connection:
        assert files.get_file(connection, TENANT, first.id) == first
        assert files.list_files(connection, TENANT).items == (second, first)
        assert files.list_files(connection, TENANT, purpose="edits").items == (first,)
        page = files.list_files(connection, TENANT, limit=1)
        assert (page.items, page.has_more) == ((second,), True)
        assert files.list_files(connection, TENANT, after=second.id).items == (first,)
        files.delete_file(connection, TENANT, first.id, actor="ada")
        with pytest.raises(NotFound):
            files.get_file(connection, TENANT, first.id)


def test_another_tenant_does_not_see_it(database: Database) -> None:
    file = add(database, "other")
    with database.write() as connection:
        assert files.list_files(connection, TENANT).items == ()
        with pytest.raises(NotFound):
            files.get_file(connection, TENANT, file.id)
        with pytest.raises(NotFound):
            files.delete_file(connection, TENANT, file.id, actor="ada")
        assert files.get_file(connection, "other", file.id) == file


def test_it_stays_while_a_job_needs_it(database: Database) -> None:
    file = add(database)
    with database.write() as connection:
        request = {"files": [file.id]}
        job = jobs.submit_job(
            connection, TENANT, "edit", base="atlas", request=request, actor="a", parent="ver_0"
        )
        for change in (None, jobs.pause_job, jobs.resume_job):
            if change is not None:
                change(connection, TENANT, job.id, actor="ada")
            with pytest.raises(Conflict, match=job.id):
                files.delete_file(connection, TENANT, file.id, actor="ada")
        jobs.cancel_job(connection, TENANT, job.id, actor="ada")
        files.delete_file(connection, TENANT, file.id, actor="ada")
