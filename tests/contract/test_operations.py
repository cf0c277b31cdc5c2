"""Readiness, the exported document, and what importing the face costs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service import Service

ROOT = Path(__file__).parents[2]


def test_ready_says_what_runs(service: Service) -> None:
    assert service.get("/healthz") == {"status": "ok"}
    ready = service.get("/readyz")
    assert (ready["ready"], ready["database"], ready["engine"]) == (True, True, True)
    assert ready["workers"] >= 1
    assert ready["bases"][0]["name"] == "atlas"


def test_the_openapi_document_is_served_and_exported(service: Service) -> None:
    exported = json.loads((ROOT / "openapi" / "openapi.json").read_text())
    assert service.get("/openapi.json") == exported
    assert "/v1/edits" in exported["paths"]


@pytest.mark.parametrize(
    "module", ["app", "app.main", "app.serve", "app.cli", "registry.jobs", "serving.client"]
)
def test_imports_without_torch(module: str) -> None:
    code = (
        f"import {module}, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["bench", "--help"]])
def test_help(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "app.cli", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Usage" in found.stdout


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ERRATA_HOST": "0.0.0.0"}, "ERRATA_HOST"),
        ({"ERRATA_BASES": "nowhere"}, "no bundled base"),
        ({"ERRATA_BASES": "mine=/nowhere"}, "config.json"),
        ({"ERRATA_DATABASE_URL": "postgres://ada:secret@db/errata"}, "postgresql+psycopg://USER"),
        (
            {"ERRATA_DATABASE_URL": "postgresql://u@/d?host=/nowhere", "ERRATA_WAIT_SECONDS": "0"},
            "did not answer for 0 s",
        ),
        ({"REDIS_URL": "redis://127.0.0.1:1", "ERRATA_WAIT_SECONDS": "0"}, "did not answer"),
        ({"REDIS_URL": "http://127.0.0.1"}, "REDIS_URL"),
    ],
)
def test_a_setting_that_cannot_work_is_one_clear_line(
    tmp_path: Path, settings: dict[str, str], said: str
) -> None:
    environment = {**Service(tmp_path).environment(), **settings}
    command = [sys.executable, "-m", "app.cli", "serve"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert said in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr
    assert "secret" not in ended.stderr


@pytest.mark.parametrize("missing", ["database", "queue"])
def test_a_worker_waits_for_what_is_not_there_as_long_as_it_is_told(
    tmp_path: Path, missing: str
) -> None:
    environment = {
        **Service(tmp_path).environment(),
        "REDIS_URL": "redis://127.0.0.1:1",
        "ERRATA_WAIT_SECONDS": "0.1",
    }
    if missing == "database":
        environment["ERRATA_DATABASE_URL"] = "postgresql://u@/d?host=/nowhere"
    command = [sys.executable, "-m", "app.cli", "worker"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert f"the {missing}" in ended.stderr
    assert "did not answer for 0.1 s" in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr


def test_a_family_that_is_not_supported_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bloom"}')
    environment = {**Service(tmp_path).environment(), "ERRATA_BASES": f"mine={folder}"}
    command = [sys.executable, "-m", "app.cli", "bases"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "'bloom' is not supported" in ended.stderr.replace("\n", " ")
