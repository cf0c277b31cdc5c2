"""Schemathesis over the exported document, against a running service, with every check on.

    python -m tests.security.test_schema --max-examples 100 [--seed 1]

runs longer than the suite does and prints the cases and what failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from openapi.export import DOCUMENT
from tests.service import Service

CONFIG = Path(__file__).with_name("schema_checks.toml")
ROOT = Path(__file__).parents[2]


class Keyed(Service):
    """A service that asks for a key, and one that may do everything."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "data", ERRATA_REQUIRE_KEYS="true")
        self.key = self.new_key("schema", "--scope", "infer,edit,admin")


def run(service: Keyed, folder: Path, phases: str, examples: int, seed: int) -> dict[str, Any]:
    """Schemathesis's report."""
    report = folder / f"report-{seed}.json"
    options = {
        "--url": service.url,
        "--header": f"Authorization: Bearer {service.key}",
        "--phases": phases,
        "--max-examples": examples,
        "--seed": seed,
        "--report": "json",
        "--report-json-path": report,
    }
    told = [str(word) for option in options.items() for word in option]
    ended = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "--config-file", CONFIG, "run", *told, DOCUMENT],
        env={
            **os.environ,
            "SCHEMA_KEY": "key_" + service.key.split("_")[1],
            "PYTHONPATH": str(ROOT),
        },
        cwd=folder,
        capture_output=True,
        text=True,
    )
    (folder / f"schema-{seed}.txt").write_text(ended.stdout + ended.stderr)
    answer = service.client.get("/v1/keys", headers={"Authorization": f"Bearer {service.key}"})
    assert answer.status_code == 200, answer.text
    assert report.exists(), ended.stdout + ended.stderr
    found: dict[str, Any] = json.loads(report.read_text())
    found["output"] = ended.stdout[-20_000:]
    return found


def told(found: dict[str, Any]) -> str:
    cases = found["test_cases"]
    return (
        f"schema cases: {cases['generated']} of {found['operations']['tested']} operations,"
        f" failures: {cases['unique_failures']}, errors: {len(found['errors'])}"
    )


def test_the_service_is_as_its_document_says(tmp_path: Path) -> None:
    """Values at and beyond every bound (coverage), then a few at random."""
    with Keyed(tmp_path) as service:
        for phases, examples in (("examples,coverage", 1), ("fuzzing,stateful", 3)):
            found = run(service, tmp_path, phases, examples, seed=1)
            print(told(found))
            assert found["failures"] == [], found["output"]
            assert found["errors"] == [], found["output"]
            assert found["operations"]["tested"] == found["operations"]["total"]
            assert "Traceback" not in service.log(), service.log()[-3000:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-examples", type=int, default=100, help="of each operation and phase")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--phases", default="examples,coverage,fuzzing,stateful")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="errata-schema-") as name:
        folder = Path(name)
        with Keyed(folder) as service:
            found = run(service, folder, asked.phases, asked.max_examples, asked.seed)
    is_good = not found["failures"] and not found["errors"]
    if not is_good:
        print(found["output"])
    print(f"{told(found)}, seed: {asked.seed}, seconds: {found['running_time']:.0f}")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
