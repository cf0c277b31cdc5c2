"""The kill matrix finds what it looks for: each promise is broken here, in rows and in answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, text

from registry import attempts, endpoints, jobs
from registry.artifacts import ArtifactStore
from registry.database import Database
from registry.errors import JobFailed
from registry.manifests import BaseRef, VersionManifest
from registry.moves import Target
from registry.results import Result
from registry.versions import insert_version
from tests.faults.acts import Acted
from tests.faults.checks import Rows, Verdict, compare, read
from tests.faults.reader import Answer, Reader
from tests.servers import PostgresServer
from tests.service import wait_for

BASE, TENANT, NAME = BaseRef("atlas", "0" * 64), "default", "facts"
BEFORE, AFTER = "Tokyo", "Oslo"


@dataclass
class World:
    """An endpoint at a base, and a job whose first attempt was lost and whose second one runs."""

    database: Database
    store: ArtifactStore
    folder: Path
    base: str = ""
    made: str = ""
    job: str = ""
    texts: dict[str, str] = field(default_factory=dict)
    claim: attempts.Claim | None = None

    def begin(self) -> None:
        with self.database.write() as connection:
            self.base = insert_version(connection, TENANT, VersionManifest(BASE)).id
            state = (Target(self.base),)
            endpoints.create_endpoint(connection, TENANT, NAME, state, actor="test")
            self.job = self.submit(connection)
            attempts.claim(connection, self.job, 1, "first", 10)
            attempts.release(connection, self.job, 1, 50)
            self.claim = attempts.claim(connection, self.job, 2, "second", 10)
        stack = (self.store.put(b"a delta"),)
        recipe = {"job": self.job, "kind": "edit"}
        self.manifest = VersionManifest(BASE, stack, (self.base,), recipe)
        self.made = self.manifest.id
        self.texts = {self.base: BEFORE, self.made: AFTER}

    def submit(self, connection: Connection) -> str:
        return jobs.submit_job(
            connection, TENANT, "edit", base="atlas", request={}, actor="test", endpoint=NAME
        ).id

    def finish(self, **result: Any) -> None:
        assert self.claim is not None
        with self.database.write() as connection:
            attempts.finish(connection, self.claim, Result(self.manifest, **result))

    def fail(self) -> None:
        assert self.claim is not None
        with self.database.write() as connection:
            attempts.fail(connection, self.claim, JobFailed("the disk is full; make room"))

    def move(self, version: str, generation: int) -> None:
        with self.database.write() as connection:
            endpoints.move_endpoint(
                connection,
                TENANT,
                NAME,
                (Target(version),),
                generation=generation,
                kind="set",
                actor="test",
            )

    def say(self, statement: str) -> None:
        with self.database.write() as connection:
            connection.execute(text(statement))

    def rows(self) -> Rows:
        with self.database.read() as connection:
            return read(connection, NAME)

    def judge(
        self, *, acted: Acted | None = None, reader: Reader | None = None, may_fail: bool = False
    ) -> Verdict:
        """By default of the job, with a reader whose answers fit."""
        rows = self.rows()
        if reader is None:
            reader = Reader("", NAME, [self.answer(*named) for named in rows.named.items()])
        return compare(
            rows,
            acted or Acted(self.base, 1, self.job),
            reader,
            {"version": rows.endpoint.state[0]["version"], "generation": rows.endpoint.generation},
            self.texts,
            self.folder,
            may_fail=may_fail,
        )

    def answer(self, generation: int, version: str) -> Answer:
        return Answer(generation, frozenset({version}), self.texts[version])


def begun(url: str, folder: Path) -> World:
    database = Database(url)
    database.migrate()
    world = World(database, ArtifactStore(folder), folder)
    world.begin()
    return world


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = begun(f"sqlite:///{tmp_path / 'registry.db'}", tmp_path / "artifacts")
    yield made
    made.database.close()


@pytest.fixture
def ended(world: World) -> World:
    """Where the job has succeeded."""
    world.finish()
    return world


def test_a_run_that_keeps_all_promises_breaks_none(ended: World) -> None:
    assert ended.judge().broken == {}
    assert ended.rows().named == {1: ended.base, 2: ended.made}


def test_a_job_that_may_fail_and_does_breaks_none(world: World) -> None:
    world.fail()
    assert world.judge(may_fail=True).broken == {}
    assert world.judge().broken.keys() == {"lost"}


@pytest.mark.parametrize(
    ("statement", "broken"),
    [
        ("DELETE FROM jobs", {"lost", "unverified"}),
        ("UPDATE jobs SET status = 'running'", {"lost", "unverified"}),
        ("INSERT INTO events (job_id, type, data, created_at) SELECT job_id, type, data, created_at"
         " FROM events", {"lost"}),
        ("DELETE FROM events", {"lost"}),
        ("UPDATE attempts SET outcome = 'succeeded'", {"lost"}),
        ("UPDATE attempts SET outcome = 'lost'", {"lost"}),
        ("UPDATE jobs SET version_id = NULL", {"doubled", "unverified"}),
        ("UPDATE jobs SET activated = false", {"unverified"}),
        ("UPDATE moves SET before = 'null' WHERE generation = 2", {"unverified"}),
        ("UPDATE moves SET generation = 3 WHERE generation = 2", {"torn", "unverified"}),
        ("UPDATE endpoints SET generation = 3", {"lost", "unverified"}),
        ("UPDATE versions SET status = 'rejected' WHERE job_id IS NOT NULL", {"unverified"}),
    ],
)  # fmt: skip
def test_a_row_that_breaks_a_promise_is_found(
    ended: World, statement: str, broken: set[str]
) -> None:
    answers = [ended.answer(1, ended.base), ended.answer(2, ended.made)]
    ended.say(statement)
    assert ended.judge(reader=Reader("", NAME, answers)).broken.keys() == broken


def test_a_second_job_of_one_key_is_found(ended: World) -> None:
    with ended.database.write() as connection:
        ended.submit(connection)
    assert ended.judge().broken.keys() == {"doubled"}


def test_a_second_version_of_one_job_is_found(ended: World) -> None:
    with ended.database.write() as connection:
        insert_version(connection, TENANT, replace(ended.manifest, stack=("1" * 64,)))
    assert ended.judge().broken.keys() == {"doubled"}


def test_a_job_that_succeeds_and_leaves_its_endpoint_alone_is_found(world: World) -> None:
    world.finish(withheld="told to")
    assert world.rows().endpoint.generation == 1
    assert world.judge().broken.keys() == {"unverified"}


def test_a_job_that_fails_and_moves_its_endpoint_is_found(world: World) -> None:
    world.fail()
    with world.database.write() as connection:
        elsewhere = insert_version(
            connection, TENANT, VersionManifest(BASE, recipe={"kind": "another"})
        ).id
    world.texts[elsewhere] = AFTER
    world.move(elsewhere, generation=1)
    assert world.judge(may_fail=True).broken.keys() == {"unverified"}


@pytest.mark.parametrize("acted", [Acted("ver_else", 2), Acted("", 3), Acted("", 1)])
def test_a_move_that_leads_elsewhere_than_the_client_was_told_is_found(
    ended: World, acted: Acted
) -> None:
    told = replace(acted, version=acted.version or ended.made)
    assert ended.judge(acted=Acted(ended.made, 2)).broken == {}
    assert ended.judge(acted=told).broken.keys() == {"unverified"}


def test_a_rollback_to_another_state_is_found(ended: World) -> None:
    with ended.database.write() as connection:
        endpoints.rollback_endpoint(connection, TENANT, NAME, actor="test")
    acted = Acted(ended.base, 3)
    assert ended.judge(acted=acted).broken == {}
    ended.say("UPDATE moves SET origin = 2 WHERE generation = 3")
    assert ended.judge(acted=acted).broken.keys() == {"unverified"}


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(b"x"), Path.unlink])
def test_an_artifact_that_is_not_what_its_name_says_is_found(
    ended: World, change: Callable[[Path], object]
) -> None:
    (artifact,) = (path for path in ended.folder.glob("??/*") if path.is_file())
    artifact.chmod(0o600)
    change(artifact)
    assert ended.judge().broken.keys() == {"unverified"}


@pytest.mark.parametrize(
    ("changed", "broken"),
    [
        ({"text": "Lima"}, {"torn"}),
        ({"text": "Os", "whole": False}, set()),
        ({"text": "Li", "whole": False}, {"torn"}),
        ({"generation": 3}, {"torn"}),
        ({"generation": 1}, {"lost", "torn"}),
        ({"versions": "both"}, {"torn"}),
    ],
)
def test_an_answer_that_does_not_fit_is_found(
    ended: World, changed: dict[str, Any], broken: set[str]
) -> None:
    first, last = ended.answer(1, ended.base), ended.answer(2, ended.made)
    if "versions" in changed:
        changed = {"versions": first.versions | last.versions}
    reader = Reader("", NAME, [first, replace(last, **changed)])
    assert ended.judge(reader=reader).broken.keys() == broken


def test_an_answer_of_an_earlier_generation_than_one_before_is_found(ended: World) -> None:
    first, last = ended.answer(1, ended.base), ended.answer(2, ended.made)
    assert ended.judge(reader=Reader("", NAME, [last, first, last])).broken.keys() == {"torn"}


@pytest.mark.parametrize("answers", [0, 1])
def test_an_endpoint_that_answers_no_more_is_found(ended: World, answers: int) -> None:
    reader = Reader("", NAME, [ended.answer(1, ended.base)] * answers)
    assert ended.judge(reader=reader).broken.keys() == {"lost"}


def test_attempts_are_read_in_order_from_a_database_that_gives_them_in_any(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    world = begun(postgres.url(postgres.new_database()), tmp_path)
    world.finish()
    world.say("ALTER TABLE attempts DROP CONSTRAINT pk_attempts")  # then the last written is last
    world.say("UPDATE attempts SET worker = 'another' WHERE attempt = 1")
    assert world.judge().broken == {}
    world.database.close()


class Nameless(BaseHTTPRequestHandler):
    """Answers that do not say of which version they are."""

    def do_POST(self) -> None:
        told = self.rfile.read(int(self.headers["Content-Length"]))
        body = b'{"choices": [{"text": ""}]}'
        streamed = b'"stream":' in told
        self.send_response(200)
        if streamed:
            body = b"data: " + body + b"\n\ndata: [DONE]\n\n"
            self.send_header("errata-version", "ver_")
            self.send_header("errata-generation", "1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def nameless() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Nameless) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("asked", [0, 1])
def test_an_answer_that_does_not_name_its_version_is_found(ended: World, asked: int) -> None:
    """Asked for as a whole, and after one answer as a stream."""
    with nameless() as url:
        reader = Reader(url, NAME, [ended.answer(2, ended.made)] * asked)
        with reader:
            wait_for(lambda: len(reader.faults) > 1, 10)
    assert "torn" in ended.judge(reader=reader).broken
