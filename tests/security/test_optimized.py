"""What is checked is checked under ``python -O`` too, where an assert is no check.

``make optimized`` runs the tests so. The service's processes have the environment of the tests.
"""

import ast
import sys
from pathlib import Path

import pytest

from tests.service import Service, wait_for

ROOT = Path(__file__).parents[2]
ROOMS = ("app", "benchmarks", "editing", "registry", "serving", "telemetry", "workers")


def test_asserts_of_tests_hold_however_python_runs() -> None:
    with pytest.raises(AssertionError, match="not within 0 s"):
        wait_for(lambda: False, 0)
    with pytest.raises(AssertionError):
        assert sys.flags.optimize < 0


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_asserts(room: str) -> None:
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert found == []


def test_the_services_processes_run_as_the_tests_do(service: Service) -> None:
    for name in ("api", "engine", "worker"):
        variables = Path(f"/proc/{service.pid(name)}/environ").read_bytes().split(b"\0")
        optimized = any(one.startswith(b"PYTHONOPTIMIZE=") and one[15:] for one in variables)
        assert optimized == bool(sys.flags.optimize), name
