"""What a client asks for in a run, and asks again until it has an answer, as real clients do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.faults.points import Act
from tests.faults.stage import EDIT, Stage


@dataclass(frozen=True)
class Acted:
    """What the client knows in the end.

    Args:
        version: the one that a move was to; where a job was asked for, the one before it.
        generation: of the endpoint after the move, or before the job.
        job: the one that was acknowledged, if a job was asked for.
    """

    version: str
    generation: int
    job: str | None = None


def prepare(stage: Stage, act: Act, endpoint: str) -> str:
    """The endpoint that a run is about; the version that a move will be to, or an edit is of."""
    base = stage.service.base_version()
    stage.service.endpoint(endpoint, base)
    if act == "edit":
        return base
    version = stage.new_version()
    if act == "move":
        return version
    _put(stage, endpoint, version, generation=1)
    return base


def perform(stage: Stage, act: Act, endpoint: str, version: str) -> Acted:
    """Ask for it, as often as it takes."""
    match act:
        case "edit":
            return Acted(version, 1, _edit(stage, endpoint))
        case "move":
            return Acted(version, _put(stage, endpoint, version, generation=1))
        case "rollback":
            path = f"/v1/endpoints/{endpoint}/rollback"
            return Acted(version, _moved(stage, "POST", path, 2, {}))


def _edit(stage: Stage, endpoint: str) -> str:
    """The id of the one job that an Idempotency-Key makes."""
    hyperparameters = {**EDIT["hyperparameters"], "learning_rate": 0.3 + stage.runs / 1e4}
    body = {**EDIT, "endpoint": endpoint, "hyperparameters": hyperparameters}
    key = {"Idempotency-Key": endpoint}
    answer = stage.insist("POST", "/v1/edits", json=body, headers=key)
    assert answer.status == 202, answer.body
    job_id: str = answer.body["id"]
    return job_id


def _put(stage: Stage, endpoint: str, version: str, generation: int) -> int:
    path = f"/v1/endpoints/{endpoint}"
    return _moved(stage, "PUT", path, generation, {"version": version})


def _moved(stage: Stage, method: str, path: str, generation: int, body: dict[str, Any]) -> int:
    """Move an endpoint once; the generation that it then has. A 412 to a request that is sent again
    says that the one before it was done."""
    tag = {"If-Match": f'"{generation}"'}
    answer = stage.insist(method, path, json=body, headers=tag)
    assert answer.status == 200 or (answer.again and answer.status == 412), answer.body
    return generation + 1
