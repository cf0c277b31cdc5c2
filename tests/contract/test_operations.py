"""Readiness, the exported document, and what importing the face costs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.service import Service

ROOT = Path(__file__).parents[2]


def test_ready_says_what_runs(service: Service) -> None:
    assert service.get("/healthz") == {"status": "ok"}
    ready = service.get("/readyz")
    parts = ("ready", "database", "queue", "engine", "artifacts")
    assert [ready[part] for part in parts] == [True] * 5
    assert ready["reasons"] == {}
    assert ready["workers"] >= 1
    assert ready["bases"][0]["name"] == "atlas"


def scraped(service: Service) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """By sample and labels, what /metrics says."""
    answer = service.client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def test_every_metric_is_documented(service: Service) -> None:
    rows = re.findall(
        r"^\| `(errata_\w+)` \| (\w+) \| ([^|]*)\| (.+) \|$",
        (ROOT / "docs" / "operations.md").read_text(),
        re.MULTILINE,
    )
    documented = {
        (name, kind, text): set(re.findall(r"`(\w+)`", labels)) for name, kind, labels, text in rows
    }
    service.text("atlas", "The capital of France is")
    service.client.get("/v1/models")
    families = list(text_string_to_metric_families(service.client.get("/metrics").text))
    found = {
        (f.name + "_total" * (f.type == "counter"), f.type, f.documentation): {
            name for sample in f.samples for name in sample.labels if name != "le"
        }
        for f in families
    }
    assert documented.keys() == found.keys()
    for family, labels in found.items():
        assert labels in (documented[family], set()), family  # without samples there are none


def test_metrics_count_what_is_asked(service: Service) -> None:
    atlas = (("base", "atlas"),)
    route = (("method", "POST"), ("route", "/v1/completions"), ("status", "200"))
    lost = (("method", "GET"), ("route", "-"), ("status", "404"))
    before = scraped(service)
    service.complete("atlas", "The capital of France is", max_tokens=5, ignore_eos=True)
    service.client.get("/v1/nothing/of/the/kind")
    service.client.get("/another")
    after = scraped(service)

    def grown(name: str, labels: tuple[tuple[str, str], ...]) -> float:
        return after[name][labels] - before.get(name, {}).get(labels, 0.0)

    assert grown("errata_http_requests_total", route) == 1
    assert grown("errata_http_requests_total", lost) == 2
    assert grown("errata_first_token_seconds_count", atlas) == 1
    assert grown("errata_inter_token_seconds_count", atlas) == 4
    assert grown("errata_engine_completion_tokens_total", atlas) == 5
    assert grown("errata_engine_prompt_tokens_total", atlas) >= 5
    assert grown("errata_engine_step_seconds_count", atlas) >= 5
    assert grown("errata_engine_step_tokens_sum", atlas) >= 9
    assert after["errata_engine_kv_blocks"][atlas] > 0
    assert after["errata_engine_versions_resident"][atlas] >= 1
    assert after["errata_engine_up"][()] == after["errata_database_up"][()] == 1
    assert after["errata_endpoint_moves_total"][(("kind", "create"),)] >= 1


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
        ({"ERRATA_PORT": "tcp://10.0.0.1:80"}, "ERRATA_PORT is 'tcp://10.0.0.1:80': Input should"),
        ({"ERRATA_LOG_FORMAT": "[json]"}, "ERRATA_LOG_FORMAT is '[json]': String should"),
        ({"ERRATA_BASES": "nowhere"}, "no bundled base"),
        ({"ERRATA_BASES": "mine=/nowhere"}, "config.json"),
        ({"ERRATA_DATABASE_URL": "postgres://ada:secret@db/errata"}, "postgresql+psycopg://USER"),
        (
            {"ERRATA_DATABASE_URL": "postgresql://u@/d?host=/nowhere", "ERRATA_WAIT_SECONDS": "0"},
            "the database postgresql://u@/d?host=%2Fnowhere does not answer",
        ),
        ({"REDIS_URL": "redis://127.0.0.1:1", "ERRATA_WAIT_SECONDS": "0"}, "does not answer"),
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
