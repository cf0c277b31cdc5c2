"""What a client asks for in a run, and asks again until it has an answer, as real clients do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from tests.faults.points import Act
from tests.faults.stage import EDIT, Stage

_SECONDS = 120.0
_PAUSE = 0.2


@dataclass(frozen=True)
class Acted:
    """What the client knows in the end.

    Args:
        job: the one that was acknowledged, if a job was asked for.
        version: the one that a move was to, else None.
        generation: of the endpoint after a move, else None.
    """

    job: str | None = None
    version: str | None = None
    generation: int | None = None


def prepare(stage: Stage, act: Act, endpoint: str) -> str | None:
    """The endpoint that a run is about, and the version that a move will be to."""
    base = stage.service.base_version()
    stage.service.endpoint(endpoint, base)
    if act == "edit":
        return None
    version = stage.new_version()
    if act == "move":
        return version
    _put(stage, endpoint, version, generation=1)
    return base


def perform(stage: Stage, act: Act, endpoint: str, version: str | None) -> Acted:
    """Ask for it, as often as it takes."""
    match act:
        case "edit":
            return Acted(job=_edit(stage, endpoint))
        case "move":
            assert version is not None
            return Acted(None, version, _put(stage, endpoint, version, generation=1))
        case "rollback":
            path = f"/v1/endpoints/{endpoint}/rollback"
            return Acted(None, version, _moved(stage, "POST", path, endpoint, 2, {}))


def _edit(stage: Stage, endpoint: str) -> str:
    """The id of the one job that an Idempotency-Key makes."""
    hyperparameters = {**EDIT["hyperparameters"], "learning_rate": 0.3 + stage.runs / 1e4}
    body = {**EDIT, "endpoint": endpoint, "hyperparameters": hyperparameters}
    key = {"Idempotency-Key": endpoint}
    response = _insist(stage, lambda client: client.post("/v1/edits", json=body, headers=key))
    assert response.status_code == 202, response.text
    job_id: str = response.json()["id"]
    return job_id


def _put(stage: Stage, endpoint: str, version: str, generation: int) -> int:
    path = f"/v1/endpoints/{endpoint}"
    return _moved(stage, "PUT", path, endpoint, generation, {"version": version})


def _moved(
    stage: Stage, method: str, path: str, endpoint: str, generation: int, body: dict[str, Any]
) -> int:
    """Move an endpoint once; its generation. A 412 to a request that is sent again says that the
    one before it was done."""
    tag = {"If-Match": f'"{generation}"'}
    sent = 0

    def send(client: httpx.Client) -> httpx.Response:
        nonlocal sent
        sent += 1
        return client.request(method, path, json=body, headers=tag)

    response = _insist(stage, send)
    assert response.status_code == 200 or (sent > 1 and response.status_code == 412), response.text
    found: int = _insist(stage, lambda client: client.get(f"/v1/endpoints/{endpoint}")).json()[
        "generation"
    ]
    return found


def _insist(stage: Stage, send: Callable[[httpx.Client], httpx.Response]) -> httpx.Response:
    """The first answer that is none of a broken connection or a server's trouble."""
    end = time.monotonic() + _SECONDS
    with httpx.Client(base_url=stage.service.url, timeout=_SECONDS) as client:
        while True:
            try:
                response = send(client)
                if response.status_code < 500:
                    return response
                told = response.text
            except httpx.TransportError as error:
                told = repr(error)
            assert time.monotonic() < end, f"no answer in {_SECONDS:g} s: {told}"
            time.sleep(_PAUSE)
