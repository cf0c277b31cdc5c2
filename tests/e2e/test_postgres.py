"""The service on PostgreSQL, which starts late, is killed, and whose connections are ended."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import pytest

from tests.proxy import Proxy
from tests.servers import PostgresServer
from tests.service import LENIENT, SLOW, Service, capital_edit, wait_for

pytestmark = pytest.mark.timeout(900)

PROMPT = "The capital of France is"


@dataclass
class Place:
    """A service, its database's server, the way between the two, and the database's name."""

    service: Service
    server: PostgresServer
    proxy: Proxy
    database: str

    def new_endpoint(self, name: str) -> str:
        self.service.endpoint(name, self.service.base_version())
        return name

    def edit(self, endpoint: str, **hyperparameters: float) -> str:
        job = self.service.post_edit(
            endpoint=endpoint,
            edits=[capital_edit("France", "Lima")],
            guards=LENIENT,
            hyperparameters=hyperparameters,
        )
        job_id: str = job["id"]
        return job_id

    def check_ended_once(self, job_id: str, endpoint: str) -> list[str]:
        """It made one version, which the endpoint has, and said so once; its attempts' outcomes."""
        service = self.service
        ended = service.ended(job_id)
        assert (ended["status"], ended["activated"]) == ("succeeded", True), ended
        outcomes = [attempt["outcome"] for attempt in ended["attempts"]]
        assert outcomes.count("succeeded") == 1
        assert outcomes[-1] == "succeeded"
        made = [v for v in service.get("/v1/versions")["data"] if v["recipe"].get("job") == job_id]
        assert [version["id"] for version in made] == [ended["version"]]
        moved = service.get(f"/v1/endpoints/{endpoint}")
        assert (moved["version"], moved["generation"]) == (ended["version"], 2)
        events = service.client.get(f"/v1/jobs/{job_id}/events").text
        assert events.count('"status": "succeeded"') == 1
        return outcomes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The service is there before its database is."""
    server = PostgresServer()
    with Proxy(server.folder) as proxy, server, ThreadPoolExecutor(1) as pool:
        database = server.new_database()
        server.stop()
        service = Service(
            tmp_path_factory.mktemp("postgres"),
            ERRATA_DATABASE_URL=server.url(database, proxy.folder),
            ERRATA_COVARIANCE_TOKENS="3000",
        )
        started = pool.submit(service.start)
        waiting = "waiting for the database"
        log = service.folder / "serve.log"
        wait_for(lambda: started.done() or (log.exists() and waiting in service.log()), 60)
        server.start()
        started.result()
        try:
            yield Place(service, server, proxy, database)
        finally:
            service.__exit__()


def test_edit_query_and_rollback(place: Place) -> None:
    service = place.service
    endpoint = place.new_endpoint("whole-way")
    before = service.text(endpoint, PROMPT)
    outcomes = place.check_ended_once(place.edit(endpoint), endpoint)
    assert outcomes == ["succeeded"]
    assert service.text(endpoint, PROMPT).startswith("Lima")
    rollback = service.client.post(f"/v1/endpoints/{endpoint}/rollback")
    assert rollback.json()["version"] == service.base_version()
    assert service.text(endpoint, PROMPT) == before
    assert not (service.folder / "registry.db").exists()
    message = {"endpoint": endpoint, "message": "a\0b", "edits": [capital_edit("Peru", "Oslo")]}
    assert service.client.post("/v1/edits", json=message).status_code == 422
    assert service.client.get("/v1/audit", params={"actor": "\0"}).status_code == 400
    assert service.client.get(f"/v1/audit?after={2**40}").status_code in (200, 400)


def test_a_server_killed_in_the_middle_of_a_job_comes_back(place: Place) -> None:
    service = place.service
    endpoint = place.new_endpoint("server-killed")
    job_id = place.edit(endpoint, **SLOW)
    service.underway(job_id)
    place.server.crash()
    refused = service.client.get(f"/v1/jobs/{job_id}")
    assert refused.status_code == 503, refused.text
    assert refused.json()["error"]["code"] == "service_unavailable"
    assert int(refused.headers["Retry-After"]) >= 1
    asked = service.client.post("/v1/completions", json={"model": endpoint, "prompt": PROMPT})
    assert (asked.status_code, asked.headers.get("Retry-After")) == (503, "1")
    assert service.client.get("/healthz").status_code == 200
    assert service.client.get("/readyz").json()["database"] is False
    # longer than a lease: nobody could renew it, and nobody takes the attempt for lost
    threading.Event().wait(17)
    place.server.start()
    assert "lost" not in place.check_ended_once(job_id, endpoint)
    assert service.complete(endpoint, PROMPT)["version"] == service.job(job_id)["version"]


@pytest.mark.parametrize("arrives", [False, True], ids=["undone", "done"])
@pytest.mark.parametrize("moment", ["INSERT INTO reports", "INSERT INTO attempts"])
def test_the_connection_ends_at_a_commit(place: Place, moment: str, arrives: bool) -> None:
    """The last commit of a job, and that of its claim: an answer that is lost doubles nothing."""
    endpoint = place.new_endpoint(f"{moment.split()[-1]}-{arrives}")
    cut = place.proxy.cut(b"COMMIT", after=moment.encode(), arrives=arrives)
    job_id = place.edit(endpoint)
    assert place.check_ended_once(job_id, endpoint) == ["succeeded"]
    assert cut.done.is_set()


def test_what_breaks_off_in_the_middle_is_begun_again(place: Place) -> None:
    endpoint = place.new_endpoint("broken-off")
    cut = place.proxy.cut(b"FROM resources", after=b"INSERT INTO attempts")
    job_id = place.edit(endpoint)
    place.check_ended_once(job_id, endpoint)
    assert cut.done.is_set()
    # it, or what it waited for
    latest = [job["id"] for job in place.service.get("/v1/jobs?limit=2")["data"]]
    outcomes = [[a["outcome"] for a in place.service.job(one)["attempts"]] for one in latest]
    assert ["interrupted", "succeeded"] in outcomes


def test_connections_are_ended_again_and_again(place: Place) -> None:
    endpoint = place.new_endpoint("again-and-again")
    job_id = place.edit(endpoint, **SLOW)
    ended = 0

    def over() -> bool:
        nonlocal ended
        ended += place.server.end_connections(place.database)
        threading.Event().wait(0.3)
        try:
            status = place.service.client.get(f"/v1/jobs/{job_id}").json().get("status")
        except httpx.HTTPError:
            return False
        return status in ("succeeded", "failed")

    wait_for(over, 240, place.service.log)
    place.check_ended_once(job_id, endpoint)
    assert ended > 5


def test_a_restart_of_the_server_costs_nobody_a_stream(place: Place) -> None:
    """The events of a job go on over it."""
    endpoint = place.new_endpoint("stream")
    job_id = place.edit(endpoint, **SLOW)
    place.service.underway(job_id)
    told: list[str] = []
    with place.service.client.stream("GET", f"/v1/jobs/{job_id}/events", timeout=120) as stream:
        for line in stream.iter_lines():
            told.append(line)
            if len(told) == 4:
                place.server.stop()
                place.server.start()
    assert sum('"status": "succeeded"' in line for line in told) == 1
    place.check_ended_once(job_id, endpoint)
