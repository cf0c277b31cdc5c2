"""Whoever can write to Redis makes the service run nothing that it would not run by itself."""

from __future__ import annotations

import json
import pickle
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from registry import jobs
from registry.database import Database
from tests.security.attacks import at_rest, tried
from tests.service import Service, wait_for
from workers.delivery import HANDED_OVER, STARTED, TARGET, WAITING


@pytest.fixture
def queue(service: Service) -> Iterator[redis.Redis]:
    """The embedded queue of a running service, as whoever has come that far writes to it."""
    variables = Path(f"/proc/{service.pid('worker')}/environ").read_bytes().split(b"\0")
    (url,) = (one[len(b"REDIS_URL=") :] for one in variables if one.startswith(b"REDIS_URL="))
    with redis.Redis.from_url(url.decode()) as connection:
        yield connection


@pytest.fixture
def ended(service: Service) -> str:
    """A job that was cancelled before it began."""
    database = Database(f"sqlite:///{service.folder / 'registry.db'}")
    with database.write() as connection:
        job = jobs.submit_job(
            connection, "default", "export", base="atlas", request={}, actor="local"
        )
        jobs.cancel_job(connection, "default", job.id, actor="local")
    database.close()
    return job.id


def call(function: str, *arguments: object) -> bytes:
    return json.dumps([function, None, arguments, {}]).encode()


def test_forged_jobs_do_nothing(
    service: Service, queue: redis.Redis, ended: str, tmp_path: Path
) -> None:
    owned = tmp_path / "owned"
    touch = f"touch {owned}"

    class Reduced:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path(owned).write_text, ("x",)

    forged: dict[str, bytes] = {
        "job_a-1": call("os.system", touch),
        "job_b-1": call("subprocess.check_call", ["touch", str(owned)]),
        "job_c-1": call("workers.run.lost", "job_c", 1),
        "job_d-1": call("pathlib.Path.touch", str(owned)),
        "job_e-1": pickle.dumps(Reduced()),
        "job_f-1": call(TARGET, ended, 1),  # another's
        "job_g-1": call(TARGET, "../../etc", 1),
        "job_h-1": call(TARGET, "job_h", 2),
        "job_i-1": call(TARGET, "job_i", "1; id"),
        "job_j-1": b"[" * 100_000,
        "job_k-1": b'"' + b"x" * 20_000_000,
        "job_l-1": b"\0",
        "job_m-1": json.dumps([TARGET, "os", ["job_m", 1], {}]).encode(),
        "job_n-1": json.dumps([TARGET, None, ["job_n", 1], {"connection": "x"}]).encode(),
        "no id": call(TARGET, "no id", 1),
        "../../x-1": call(TARGET, "../../x", 1),
        "job_o-1; id": call(TARGET, "job_o", 1),
        f"{ended}-1": call(TARGET, ended, 1),  # of a job that is over
        f"{ended}-99": call(TARGET, ended, 99),  # an attempt that is not due
    }
    before, log = at_rest(service), len(service.log())
    for name, data in forged.items():
        fields = {"data": zlib.compress(data), "status": "queued", "origin": "errata"}
        queue.hset(f"rq:job:{name}", mapping=fields)
        queue.rpush(WAITING, name)
    garbage = [b"\xff\xfe", b"", b"\0", b"a" * 100_000, b"job_none-1", b"job_x-1:.."]
    for raw in garbage:
        queue.rpush(WAITING, raw)
        queue.rpush(HANDED_OVER, raw)
    queue.set("rq:job:job_z-1", "no hash")
    queue.rpush(WAITING, "job_z-1")
    queue.zadd(STARTED, {"malformed": 1, b"\xff:\xff": 1, "job_none-1:x": 1})
    tried["the queue"] = len(forged) + 2 * len(garbage) + 4

    def is_empty() -> bool:
        lists = queue.llen(WAITING), queue.llen(HANDED_OVER), queue.zcard(STARTED)
        return lists == (0, 0, 0) and not [*queue.scan_iter("rq:job:*")]

    left = lambda: f"{[*queue.scan_iter('rq:*')]}\n{service.log()[-3000:]}"  # noqa: E731
    wait_for(is_empty, 240, left)
    assert not owned.exists()
    assert at_rest(service) == before
    service.wait_ready()
    assert "Traceback" not in service.log()[log:]
