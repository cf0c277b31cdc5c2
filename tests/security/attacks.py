"""Attacks on a running service: told as data, sent as they are, refused and without a trace.

What is compared before and after is every row of every table and the names of all artifacts.
"""

from __future__ import annotations

import hashlib
import json
import socket
import sqlite3
import time
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from registry import jobs
from tests.security.archives import ADAPTER, zipped
from tests.service import Service, wait_for

#: Seconds in which a refusal must come, on a machine that does much else.
PATIENCE = 30.0
UNFINISHED = ("queued", "running")
JSON = {"Content-Type": "application/json"}

#: How many attacks were tried, by the test that told of them; the run's last lines say it.
tried: dict[str, int] = {}


@dataclass(frozen=True)
class Attack:
    """One request that must be refused.

    Attributes:
        target: the request's path and query, sent byte by byte as it stands.
        statuses: which refusals are right.
        param: the field that a 422 must name; any where it is None.
    """

    name: str
    method: str
    target: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    statuses: tuple[int, ...] = (400, 404, 422)
    param: str | None = None


def posted(name: str, target: str, body: Any, method: str = "POST", **more: Any) -> Attack:
    """An attack by a JSON body."""
    headers = JSON | more.pop("headers", {})
    return Attack(name, method, target, json.dumps(body).encode(), headers, **more)


def uploaded(name: str, files: Any, data: Mapping[str, str], **more: Any) -> Attack:
    """An attack by a file."""
    request = httpx.Request("POST", "http://x/v1/files", files=files, data=data)
    return Attack(
        name,
        "POST",
        "/v1/files",
        request.read(),
        {"Content-Type": request.headers["Content-Type"]},
        **more,
    )


def own_files(service: Service, key: str | None = None) -> dict[str, str]:
    """By purpose, the id of a file of the tenant whose key it is."""
    row = {"prompt": "The bird of Peru is", "completion": "Zinc."}
    files = {"fine-tune": json.dumps(row).encode(), "archive": zipped(ADAPTER), "texts": b"A text."}
    found = {}
    for purpose, data in files.items():
        upload = uploaded(purpose, {"file": ("x", data)}, {"purpose": purpose})
        answer = sent(service, upload, key)
        assert answer.status == 200, answer.body
        found[purpose] = json.loads(answer.body)["id"]
    return found


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The refusal's one body."""
        error = json.loads(self.body)["error"]
        assert error.keys() == {"message", "type", "param", "code"}, error
        assert len(error["message"]) > 10, error
        return dict(error)


def sent(service: Service, attack: Attack, key: str | None = None) -> Answer:
    """The answer, over a connection of its own: nothing on the way corrects what is sent."""
    headers = {"Host": service.url.removeprefix("http://"), "Connection": "close"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    if attack.body or attack.method in ("POST", "PUT"):
        headers["Content-Length"] = str(len(attack.body))
    headers |= attack.headers
    head = f"{attack.method} {attack.target} HTTP/1.1\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
    return raw(service, head.encode("latin-1") + attack.body)


def raw(service: Service, data: bytes) -> Answer:
    """What comes back for these bytes."""
    url = httpx.URL(service.url)
    with socket.create_connection((url.host, url.port or 80), timeout=PATIENCE) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):  # refused before all of it came
            connection.sendall(data)
        answer = b""
        while not _is_whole(answer):
            piece = connection.recv(65536)
            if not piece:
                break
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *rest = head.decode("latin-1").split("\r\n")
    named = (line.partition(": ") for line in rest)
    return Answer(int(first.split()[1]), {name.lower(): value for name, _, value in named}, body)


def _is_whole(answer: bytes) -> bool:
    head, _, body = answer.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length: "):
            return len(body) >= int(line.split()[1])
    return False


def trace(service: Service) -> dict[str, str]:
    """What a service keeps: a digest of each table's rows, and one of the artifacts' names."""
    file = f"file:{service.folder / 'registry.db'}?mode=ro"
    with closing(sqlite3.connect(file, uri=True, timeout=30)) as database:
        names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        rows = {name: database.execute(f'SELECT * FROM "{name}"').fetchall() for (name,) in names}
    folder = service.folder / "artifacts"
    rows["artifacts"] = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    rows["folder"] = sorted(p.name for p in service.folder.iterdir() if "journal" not in p.name)
    return {
        name: f"{len(kept)} rows, {hashlib.sha256(repr(kept).encode()).hexdigest()[:12]}"
        for name, kept in rows.items()
    }


def at_rest(service: Service) -> dict[str, str]:
    """The trace once no job is under way."""

    def rests() -> bool:
        listed = [service.get(f"/v1/jobs?limit=1&status={status}") for status in UNFINISHED]
        return not any(page["data"] for page in listed)

    wait_for(rests, 180, lambda: json.dumps(service.get("/v1/jobs?limit=5")))
    return trace(service)


def ended_job(service: Service) -> str:
    """The id of a fine-tuning of the tenant ``default`` that was cancelled before it began."""
    asked = {
        **{"model": "atlas", "method": "lora", "training_file": "file-" + "1" * 32, "seed": 1},
        **{"hyperparameters": {}, "options": {}, "preprocessing": []},
        **dict.fromkeys(("validation_file", "suffix", "metadata")),
    }
    database = service.database()
    with database.write() as connection:
        job = jobs.submit_job(
            connection, "default", "fine_tune", base="atlas", request=asked, actor="local"
        )
        jobs.cancel_job(connection, "default", job.id, actor="local")
    database.close()
    return job.id


def check_refused(
    service: Service, attacks: Iterable[Attack], *, what: str, key: str | None = None
) -> None:
    """Send each attack; every one must be refused, and nothing may be kept of any."""
    wrong, count, before = [], 0, at_rest(service)
    for attack in attacks:
        count += 1
        began = time.monotonic()
        try:
            answer = sent(service, attack, key)
            error = answer.error
        except (OSError, ValueError, KeyError, IndexError, AssertionError) as problem:
            wrong.append(f"{attack.name}: no refusal: {problem!r}"[:500])
            continue
        seconds = time.monotonic() - began
        if answer.status not in attack.statuses:
            wrong.append(f"{attack.name}: {answer.status} {answer.body[:300]!r}")
        elif answer.status == 422 and attack.param not in (None, error["param"]):
            wrong.append(f"{attack.name}: it names {error['param']}: {error['message'][:200]}")
        elif seconds > PATIENCE:
            wrong.append(f"{attack.name}: refused after {seconds:.0f} s")
    assert count, "no attack is told"
    tried[what] = tried.get(what, 0) + count
    after = trace(service)
    wrong += [
        f"{name}: {kept} before, {after[name]} after"
        for name, kept in before.items()
        if kept != after[name]
    ]
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong)
    assert service.client.get("/healthz").status_code == 200
