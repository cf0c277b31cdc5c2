import math
import time
from dataclasses import replace

import pytest

from registry import attempts, endpoints, jobs
from registry.curves import PURPOSE, as_csv, curves
from registry.database import Database
from registry.errors import (
    Conflict,
    LeaseLost,
    NotFound,
    TooManyRequests,
    UnprocessableRequest,
)
from registry.files import ResultFile, get_file, result_file_id
from registry.jobs import Job
from registry.manifests import GuardResult, Progress, VersionManifest
from registry.moves import Target
from registry.results import Result
from registry.versions import (
    DELETED,
    READY,
    REJECTED,
    get_version,
    insert_version,
    list_versions,
    reports,
)
from telemetry.context import bound
from tests.servers import PostgresServer
from tests.unit.registry.conftest import BASE, TENANT, add_version

LEASE = 10.0


@pytest.fixture
def endpoint(database: Database) -> str:
    version = add_version(database)
    with database.write() as connection:
        endpoints.create_endpoint(connection, TENANT, "facts", (Target(version.id),), actor="test")
    return "facts"


def submit(database: Database, endpoint: str | None, **request: object) -> Job:
    with database.write() as connection:
        return jobs.submit_job(
            connection,
            TENANT,
            "edit",
            base="atlas",
            request=request,
            actor="test",
            endpoint=endpoint,
        )


def begin(database: Database, job: Job, attempt: int = 1) -> attempts.Claim:
    with database.write() as connection:
        claim = attempts.claim(connection, job.id, attempt, "worker", LEASE)
    assert claim is not None
    return claim


def made_by(claim: attempts.Claim, delta: str) -> Result:
    assert claim.parent is not None
    parent = claim.parent.manifest
    manifest = VersionManifest(
        BASE, (*parent.stack, delta), (parent.id,), {"job": claim.job.id, "kind": "edit"}
    )
    return Result(manifest, {"before": {}, "after": {}}, ())


def finish(database: Database, claim: attempts.Claim, result: Result) -> Job:
    with database.write() as connection:
        return attempts.finish(connection, claim, result)


def head(database: Database) -> str:
    with database.read() as connection:
        return endpoints.get_endpoint(connection, TENANT, "facts").head


def waiting(database: Database) -> list[str]:
    with database.read() as connection:
        return [job.id for job in attempts.dispatchable(connection)]


def test_of_what_was_put_on_the_queue_it_is_noted_unless_it_began(database: Database) -> None:
    begun, other, third = (submit(database, None) for _ in range(3))
    with database.read() as connection:
        due = attempts.dispatchable(connection)
    begin(database, begun)
    with database.write() as connection:
        attempts.mark_dispatched(connection, due[:2])
    with database.read() as connection:
        found = [jobs.get_job(connection, TENANT, j.id) for j in (begun, other, third)]
    assert [job.dispatched_at is not None for job in found] == [False, True, False]


def test_jobs_of_an_endpoint_run_in_order_each_on_the_head(
    database: Database, endpoint: str
) -> None:
    first, second, free = (
        submit(database, endpoint),
        submit(database, endpoint),
        submit(database, None),
    )
    assert waiting(database) == [first.id, free.id]
    claim = begin(database, first)
    assert waiting(database) == [free.id]
    done = finish(database, claim, made_by(claim, "a" * 64))
    assert (done.status, done.activated, head(database)) == ("succeeded", True, done.version_id)
    assert waiting(database) == [second.id, free.id]
    claim = begin(database, second)
    finish(database, claim, made_by(claim, "b" * 64))
    with database.read() as connection:
        stack = get_version(connection, TENANT, head(database)).manifest.stack
    assert stack == ("a" * 64, "b" * 64)


def test_only_one_of_two_deliveries_is_claimed(database: Database, endpoint: str) -> None:
    job = submit(database, endpoint)
    begin(database, job)
    with database.write() as connection:
        assert attempts.claim(connection, job.id, 1, "other", LEASE) is None
        assert attempts.claim(connection, job.id, 2, "other", LEASE) is None


def test_a_superseded_attempt_leaves_nothing_behind(database: Database, endpoint: str) -> None:
    job = submit(database, endpoint)
    frozen = begin(database, job)
    with database.write() as connection:
        assert attempts.expired(connection, time.time()) == []
        assert [j.id for j in attempts.expired(connection, time.time() + LEASE + 1)] == [job.id]
        assert attempts.release(connection, job.id, 1, max_attempts=5)
        assert not attempts.release(connection, job.id, 1, max_attempts=5)
    second = begin(database, job, 2)
    result = made_by(frozen, "a" * 64)
    for write in (
        lambda c: attempts.finish(c, frozen, result),
        lambda c: attempts.heartbeat(c, frozen, LEASE),
        lambda c: attempts.record_progress(c, frozen, Progress(1, 2, "half")),
        lambda c: attempts.cancel(c, frozen),
    ):
        with pytest.raises(LeaseLost, match="superseded"), database.write() as connection:
            write(connection)
    assert finish(database, second, made_by(second, "b" * 64)).status == "succeeded"
    with pytest.raises(LeaseLost), database.write() as connection:
        attempts.finish(connection, frozen, result)
    with database.read() as connection:
        assert len(list_versions(connection, TENANT).items) == 2  # the base and one result
        assert [a["outcome"] for a in attempts.attempts(connection, job.id)] == [
            "lost",
            "succeeded",
        ]


def test_a_job_whose_workers_keep_dying_fails(database: Database, endpoint: str) -> None:
    job = submit(database, endpoint)
    for attempt in (1, 2):
        begin(database, job, attempt)
        with database.write() as connection:
            attempts.release(connection, job.id, attempt, max_attempts=2)
    with database.read() as connection:
        ended = jobs.get_job(connection, TENANT, job.id)
    assert ended.status == "failed"
    assert ended.error is not None
    assert ended.error["code"] == "attempts_exhausted"
    assert "died 2 times" in ended.error["message"]


def test_who_does_not_know_whether_it_claimed_may_claim_again(
    database: Database, endpoint: str
) -> None:
    job = submit(database, endpoint)
    claim = begin(database, job)
    assert begin(database, job) == claim
    with database.write() as connection:
        assert attempts.claim(connection, job.id, 1, "another worker", LEASE) is None
        assert len(attempts.attempts(connection, job.id)) == 1
        started = [e for e in jobs.events(connection, job.id) if e.data.get("attempt") == 1]
        assert len(started) == 1
    finish(database, claim, made_by(claim, "b" * 64))
    with database.write() as connection:
        assert attempts.claim(connection, job.id, 1, "worker", LEASE) is None


def test_what_is_broken_off_runs_again_and_is_no_death(database: Database, endpoint: str) -> None:
    job = submit(database, endpoint)
    begin(database, job, 1)
    with database.write() as connection:
        attempts.release(connection, job.id, 1, max_attempts=2)
    claim = begin(database, job, 2)
    with database.write() as connection:
        attempts.interrupt(connection, claim, "no room", max_attempts=2)
        again = jobs.get_job(connection, TENANT, job.id)
    assert (again.status, again.message) == ("queued", "no room; waiting for another attempt")
    with pytest.raises(LeaseLost), database.write() as connection:
        attempts.interrupt(connection, claim, "no room", max_attempts=2)
    last = begin(database, job, 3)
    with database.write() as connection:
        attempts.interrupt(connection, last, "no room", max_attempts=2)
        ended = jobs.get_job(connection, TENANT, job.id)
        outcomes = [attempt["outcome"] for attempt in attempts.attempts(connection, job.id)]
    assert (ended.status, outcomes) == ("failed", ["lost", "interrupted", "failed"])
    assert ended.error is not None
    assert "the last one by no room" in ended.error["message"]


def test_what_is_broken_off_ends_as_its_user_asked(database: Database, endpoint: str) -> None:
    job = submit(database, endpoint)
    claim = begin(database, job)
    with database.write() as connection:
        jobs.cancel_job(connection, TENANT, job.id, actor="test")
        attempts.interrupt(connection, claim, "no room", max_attempts=5)
        assert jobs.get_job(connection, TENANT, job.id).status == "cancelled"


def test_a_worker_that_stops_is_no_death(database: Database, endpoint: str) -> None:
    job = submit(database, endpoint)
    for attempt in (1, 2, 3):
        begin(database, job, attempt)
        with database.write() as connection:
            attempts.release(connection, job.id, attempt, 2, attempts.RELEASED)
    with database.read() as connection:
        assert jobs.get_job(connection, TENANT, job.id).status == "queued"
        outcomes = [attempt["outcome"] for attempt in attempts.attempts(connection, job.id)]
    assert outcomes == ["released"] * 3


def test_so_many_jobs_and_no_more(database: Database) -> None:
    def check(tenant: str, of_tenant: int, most: int) -> None:
        with database.read() as connection:
            jobs.check_room(connection, tenant, of_tenant, most)

    first, _ = submit(database, None), submit(database, None)
    check(TENANT, 3, 3)
    for tenant, of_tenant, most, setting in (
        (TENANT, 2, 9, "ERRATA_MAX_TENANT_JOBS"),
        ("other", 2, 2, "ERRATA_MAX_JOBS"),
    ):
        with pytest.raises(TooManyRequests, match=setting) as caught:
            check(tenant, of_tenant, most)
        assert (caught.value.code, caught.value.retry_after) == ("queue_full", jobs.FULL_SECONDS)
    check("other", 1, 3)
    with database.write() as connection:
        jobs.cancel_job(connection, TENANT, first.id, actor="test")
    check(TENANT, 2, 2)


def test_a_job_keeps_what_its_request_carried_apart(database: Database) -> None:
    with bound(request_id="req_1"):
        job = submit(database, None, message="hello")
    assert (job.request, job.carried) == ({"message": "hello"}, {"request_id": "req_1"})
    assert submit(database, None, message="hello").carried == {}


def test_an_endpoint_that_moved_is_left_alone(database: Database, endpoint: str) -> None:
    other = add_version(database, "c" * 64)
    claim = begin(database, submit(database, endpoint))
    with database.write() as connection:
        endpoints.move_endpoint(
            connection,
            TENANT,
            endpoint,
            (Target(other.id),),
            generation=1,
            kind="set",
            actor="somebody",
        )
    job = finish(database, claim, made_by(claim, "a" * 64))
    assert (job.status, job.activated, job.reason) == ("succeeded", False, "endpoint_moved")
    assert head(database) == other.id


@pytest.mark.parametrize(("kind", "status"), [("set", "queued"), ("rollback", "succeeded")])
def test_rerun_on_the_new_head_but_never_after_a_rollback(
    database: Database, endpoint: str, kind: str, status: str
) -> None:
    other = add_version(database, "c" * 64)
    claim = begin(database, submit(database, endpoint, on_conflict="rerun"))
    with database.write() as connection:
        endpoints.move_endpoint(
            connection,
            TENANT,
            endpoint,
            (Target(other.id),),
            generation=1,
            kind=kind,
            actor="somebody",
        )
    job = finish(database, claim, made_by(claim, "a" * 64))
    assert job.status == status
    if status == "queued":
        again = begin(database, job, 2)
        assert finish(database, again, made_by(again, "a" * 64)).activated
        with database.read() as connection:
            stack = get_version(connection, TENANT, head(database)).manifest.stack
        assert stack == ("c" * 64, "a" * 64)


@pytest.mark.parametrize("change", ["split", "delete"])
def test_what_cannot_run_again_on_the_endpoint_is_kept(
    database: Database, endpoint: str, change: str
) -> None:
    other = add_version(database, "c" * 64)
    claim = begin(database, submit(database, endpoint, on_conflict="rerun"))
    with database.write() as connection:
        if change == "delete":
            endpoints.delete_endpoint(connection, TENANT, endpoint, generation=1, actor="somebody")
        else:
            endpoints.move_endpoint(
                connection,
                TENANT,
                endpoint,
                (
                    Target(other.id),
                    Target(endpoints.get_endpoint(connection, TENANT, endpoint).head),
                ),
                generation=1,
                kind="set",
                actor="somebody",
            )
    job = finish(database, claim, made_by(claim, "a" * 64))
    assert (job.status, job.activated, job.reason) == ("succeeded", False, "endpoint_moved")
    assert job.version_id is not None
    with database.read() as connection:
        assert get_version(connection, TENANT, job.version_id).status == READY


def test_a_rejected_version_is_kept_and_serves_nobody(database: Database, endpoint: str) -> None:
    claim = begin(database, submit(database, endpoint))
    made = made_by(claim, "a" * 64)
    guard = GuardResult("perplexity", "failed", 7.0, 1.1, 1.0)
    job = finish(database, claim, Result(made.manifest, made.metrics, (guard,)))
    assert (job.status, job.reason, job.activated) == ("failed", "guard_rejected", False)
    assert job.version_id is not None
    with database.write() as connection:
        assert get_version(connection, TENANT, job.version_id).status == REJECTED
        with pytest.raises(
            Conflict, match=r"'perplexity': 7, its limit is 1\.1; before .* 1\).*force"
        ):
            endpoints.move_endpoint(
                connection,
                TENANT,
                endpoint,
                (Target(job.version_id),),
                generation=1,
                kind="set",
                actor="somebody",
            )


@pytest.mark.parametrize("before", [READY, REJECTED, DELETED])
@pytest.mark.parametrize("verdict", ["passed", "failed"])
def test_what_is_brought_back_is_what_the_guards_say_now(
    database: Database, endpoint: str, before: str, verdict: str
) -> None:
    claim = begin(database, submit(database, endpoint, activate=False))
    made = made_by(claim, "a" * 64)
    assert made.manifest is not None
    with database.write() as connection:
        insert_version(connection, TENANT, made.manifest, status=before)
    guard = GuardResult("norm", verdict, 7.0, 8.0)
    job = finish(database, claim, Result(made.manifest, made.metrics, (guard,)))
    assert job.status == ("succeeded" if verdict == "passed" else "failed")
    with database.read() as connection:
        found = get_version(connection, TENANT, made.manifest.id)
        newest = reports(connection, TENANT, found.id)[-1]
    assert found.status == (READY if before == READY or verdict == "passed" else REJECTED)
    assert [one["result"] for one in newest["guards"]] == [verdict]


def test_what_guards_stopped_is_ready_and_moves_nothing(database: Database, endpoint: str) -> None:
    before = head(database)
    claim = begin(database, submit(database, endpoint))
    made = made_by(claim, "a" * 64)
    passed = GuardResult("norm", "passed", 1.0, 2.0)
    job = finish(
        database,
        claim,
        Result(made.manifest, made.metrics, (passed,), "d" * 64, withheld="guard_stopped"),
    )
    assert (job.status, job.reason, job.activated) == ("succeeded", "guard_stopped", False)
    assert head(database) == before
    assert job.version_id is not None
    with database.read() as connection:
        assert get_version(connection, TENANT, job.version_id).status == READY
        (report,) = reports(connection, TENANT, job.version_id)
    assert report["holds"] == "d" * 64


def test_force_makes_a_rejected_version_ready_on_record(database: Database, endpoint: str) -> None:
    claim = begin(database, submit(database, endpoint))
    made = made_by(claim, "a" * 64)
    guards = (
        GuardResult("perplexity", "passed", 1.0, 1.1, 1.0),
        GuardResult("norm", "failed", None, 30.0),
    )
    job = finish(database, claim, Result(made.manifest, made.metrics, guards))
    assert job.version_id is not None
    state = (Target(job.version_id), Target(head(database)))
    with database.write() as connection:
        endpoints.force_state(connection, TENANT, state, actor="ada", message="known")
        endpoints.force_state(connection, TENANT, state, actor="bob", message="again")
        endpoints.move_endpoint(
            connection, TENANT, endpoint, state, generation=1, kind="set", actor="ada"
        )
        assert get_version(connection, TENANT, job.version_id).status == READY
        _, override = reports(connection, TENANT, job.version_id)
    assert (override["kind"], override["actor"], override["message"]) == (
        "override",
        "ada",
        "known",
    )
    assert override["overridden"] == [
        {"name": "norm", "result": "failed", "value": None, "limit": 30.0, "before": None}
    ]


def test_a_job_waits_for_the_one_it_needs_and_fails_with_it(database: Database) -> None:
    with database.write() as connection:
        prepare = jobs.submit_job(
            connection, TENANT, "prepare", base="atlas", request={}, actor="test"
        )
        edit = jobs.submit_job(
            connection, TENANT, "edit", base="atlas", request={}, actor="test", after=prepare.id
        )
    assert waiting(database) == [prepare.id]
    with database.write() as connection:
        jobs.cancel_job(connection, TENANT, prepare.id, actor="ada")
    assert waiting(database) == [edit.id]
    with database.write() as connection:
        assert attempts.claim(connection, edit.id, 1, "worker", LEASE) is None
        ended = jobs.get_job(connection, TENANT, edit.id)
    assert ended.status == "failed"
    assert ended.error is not None
    assert ended.error["code"] == "prepare_failed"


def test_only_a_job_of_ones_own_that_is_to_be_done_is_waited_for(database: Database) -> None:
    def found(tenant: str = TENANT, *names: str) -> str | None:
        with database.read() as connection:
            job = jobs.unfinished_like(connection, tenant, "prepare", "atlas", {"a", *names})
        return None if job is None else job.id

    with database.write() as connection:
        prepare = jobs.submit_job(
            connection,
            TENANT,
            "prepare",
            base="atlas",
            request={"resources": ["a", "b"]},
            actor="test",
        )
    assert (found(), found(TENANT, "b")) == (prepare.id, prepare.id)
    assert (found(TENANT, "c"), found("other")) == (None, None)
    claim = begin(database, prepare)
    assert found() == prepare.id
    with database.write() as connection:
        jobs.cancel_job(connection, TENANT, prepare.id, actor="ada")
        assert jobs.get_job(connection, TENANT, prepare.id).status == "running"
    assert found() is None
    with database.write() as connection:
        attempts.cancel(connection, claim)
    assert found() is None


def test_cancel_queued_running_and_ended(database: Database, endpoint: str) -> None:
    queued = submit(database, endpoint)
    with database.write() as connection:
        assert jobs.cancel_job(connection, TENANT, queued.id, actor="ada").status == "cancelled"
        with pytest.raises(Conflict, match="has ended"):
            jobs.cancel_job(connection, TENANT, queued.id, actor="ada")
    running = begin(database, submit(database, endpoint))
    with database.write() as connection:
        jobs.cancel_job(connection, TENANT, running.job.id, actor="ada")
        assert attempts.heartbeat(connection, running, LEASE).cancel_requested
        attempts.cancel(connection, running)
        assert jobs.get_job(connection, TENANT, running.job.id).status == "cancelled"


def test_idempotency_key(database: Database) -> None:
    job = submit(database, None)
    with database.write() as connection:
        assert jobs.find_idempotent(connection, TENANT, "key", "body") is None
        jobs.remember_idempotent(connection, TENANT, "key", "body", job.id)
        found = jobs.find_idempotent(connection, TENANT, "key", "body")
        assert found is not None
        assert found.id == job.id
        with pytest.raises(UnprocessableRequest, match="another request"):
            jobs.find_idempotent(connection, TENANT, "key", "other body")
        assert jobs.find_idempotent(connection, "other tenant", "key", "other body") is None


def test_another_tenants_job_does_not_exist(database: Database) -> None:
    job = submit(database, None)
    with database.read() as connection, pytest.raises(NotFound):
        jobs.get_job(connection, "other", job.id)


def test_events_are_replayed_from_where_the_reader_stopped(
    database: Database, endpoint: str
) -> None:
    claim = begin(database, submit(database, endpoint))
    with database.write() as connection:
        attempts.record_progress(connection, claim, Progress(1, 2, "half", {"loss": 0.5}))
    ended = finish(database, claim, made_by(claim, "a" * 64))
    assert (ended.done, ended.total, ended.message) == (2, 2, "done")
    with database.read() as connection:
        seen = jobs.events(connection, claim.job.id)
        rest = jobs.events(connection, claim.job.id, after=seen[1].seq)
    assert [e.type for e in seen] == ["status", "status", "progress", "status"]
    assert seen[2].data["metrics"] == {"loss": 0.5}
    assert rest == seen[2:]


def test_what_is_not_finite_is_written_as_nothing(database: Database, endpoint: str) -> None:
    claim = begin(database, submit(database, endpoint))
    metrics = {"train_loss": 0.5, "gradient_norm": math.nan, "valid_loss": -math.inf}
    progress = Progress(1, 2, "half", metrics)
    with database.write() as connection:
        assert not attempts.is_recorded(connection, claim, progress)
        attempts.record_progress(connection, claim, progress)
        assert attempts.is_recorded(connection, claim, progress)
    with database.read() as connection:
        steps = curves(connection, claim.job.id)
    assert steps == {1: {"train_loss": 0.5, "gradient_norm": None, "valid_loss": None}}
    assert as_csv(steps).decode().splitlines()[1] == "1,0.5,,"


def test_leases_run_by_the_clock_of_the_server(
    postgres: PostgresServer, migrated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a worker whose machine is a minute behind, and of one that is a minute ahead."""
    name = postgres.new_database(migrated)
    database = Database(postgres.url(name))
    moment = time.time
    behind, ahead = submit(database, None), submit(database, None)
    monkeypatch.setattr(time, "time", lambda: moment() - 60)
    claim = begin(database, behind)
    with database.write() as connection:
        attempts.heartbeat(connection, claim, LEASE)
    monkeypatch.setattr(time, "time", lambda: moment() + 60)
    begin(database, ahead)
    with database.read() as connection:
        assert attempts.expired(connection) == []
        late = attempts.expired(connection, moment() + LEASE + 30)
    assert {job.id for job in late} == {behind.id, ahead.id}
    database.close()
    postgres.drop(name)


def test_a_job_leaves_its_file(database: Database, endpoint: str) -> None:
    claim = begin(database, submit(database, endpoint))
    left = ResultFile("step_metrics.csv", PURPOSE, 12, "d" * 64, 3)
    finish(database, claim, replace(made_by(claim, "a" * 64), file=left))
    with database.read() as connection:
        file = get_file(connection, TENANT, result_file_id(claim.job.id))
    assert (file.filename, file.purpose, file.size) == ("step_metrics.csv", PURPOSE, 12)
    assert (file.content, file.row_count) == ("d" * 64, 3)
