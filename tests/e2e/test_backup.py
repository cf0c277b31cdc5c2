"""A running service is backed up in the middle of a job, and goes on elsewhere from there."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.servers import PostgresServer
from tests.service import LENIENT, SLOW, Service, capital_edit

PROMPT = "The capital of France is"
DOCUMENT = (Path(__file__).parents[2] / "docs" / "backup.md").read_text()


@pytest.fixture
def shell(tmp_path: Path) -> Path:
    """A folder in which ``errata`` is a command."""
    command = tmp_path / "bin" / "errata"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m app.cli "$@"\n')
    command.chmod(0o755)
    return tmp_path


def run(service: Service, folder: Path, script: str) -> str:
    """What a script prints that works in a folder on a service's data."""
    environment = service.environment()
    environment["PATH"] = f"{folder / 'bin'}:{environment['PATH']}"
    environment["PYTHONPATH"] = os.environ.get("PYTHONPATH") or str(Path(__file__).parents[2])
    ended = subprocess.run(
        ["sh", "-euc", script],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def answers(service: Service, model: str) -> tuple[str, list[float]]:
    choice = service.complete(model, PROMPT, logprobs=1)["choices"][0]
    return choice["text"], choice["logprobs"]["token_logprobs"]


def told(service: Service) -> dict[str, Any]:
    """What a service says of itself that no job changes meanwhile."""
    paths = [
        "/v1/endpoints/kept",
        "/v1/endpoints/kept/history",
        "/v1/endpoints/kept/edits",
        "/v1/endpoints/atlas/history",
        "/v1/audit?target=kept",
    ]
    paths += [f"/v1/versions/{move['after'][0]['version']}" for move in moves(service)]
    return {path: service.get(path) for path in paths}


def moves(service: Service) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = service.get("/v1/endpoints/kept/history")["data"]
    return [move for move in found if move["after"]]


def test_a_service_goes_on_elsewhere(
    service: Service, shell: Path, postgres: PostgresServer
) -> None:
    """From SQLite to PostgreSQL."""
    key = run(service, shell, "errata keys create ada --scope infer,edit,admin").strip()
    base = service.base_version()
    service.endpoint("kept", base)
    quick = {"hyperparameters": {"steps": 15}, "guards": LENIENT}
    first = service.post_edit(endpoint="kept", edits=[capital_edit("France", "Oslo")], **quick)
    made = service.ended(first["id"])
    assert made["activated"], made
    service.client.post("/v1/endpoints/kept/rollback")
    service.client.post("/v1/endpoints/kept/rollback", json={"to_generation": 2})
    service.endpoint("busy", made["version"])
    running = service.post_edit(
        endpoint="busy", edits=[capital_edit("Peru", "Lyon")], hyperparameters=SLOW, guards=LENIENT
    )
    waiting = service.post_edit(endpoint="busy", edits=[capital_edit("Chad", "Lyon")], **quick)
    service.underway(running["id"])

    (script,) = re.findall(r"```bash\n(.*?)```", DOCUMENT, re.DOTALL)
    script = script.replace("ERRATA_DATA=restored errata serve\n", "")
    printed = run(service, shell, script)
    assert "whole" in printed
    assert "restored" in printed
    assert stat.S_IMODE((shell / "backups").stat().st_mode) == 0o700

    expected, logits = told(service), answers(service, made["version"])
    assert service.job(running["id"])["status"] in ("running", "succeeded")
    for job in (waiting, running):
        service.client.post(f"/v1/jobs/{job['id']}/cancel")

    moved = {"ERRATA_DATABASE_URL": postgres.url(postgres.new_database())}
    exported = "".join(f"export {name}='{value}'; " for name, value in moved.items())
    run(service, shell, f"{exported} ERRATA_DATA=moved errata restore backups")
    with Service(shell / "moved", ERRATA_REQUIRE_KEYS="true", **moved) as other:
        assert other.client.get("/v1/jobs").status_code == 401
        other.client.headers["Authorization"] = f"Bearer {key}"
        found = told(other)
        assert found == expected
        assert answers(other, made["version"]) == logits
        assert answers(other, "kept")[0].strip().startswith("Oslo")
        ends = [other.ended(job["id"]) for job in (running, waiting)]
        assert [end["activated"] for end in ends] == [True, True], ends
        assert ends[0]["attempts"][0]["outcome"] == "lost"
        assert other.get("/v1/endpoints/busy")["version"] == ends[1]["version"]
        rolled = other.client.post("/v1/endpoints/busy/rollback", json={"to_generation": 1})
        assert rolled.json()["version"] == made["version"]
        assert answers(other, "busy") == logits
