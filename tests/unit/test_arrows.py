"""Imports go one way down, as docs/architecture.md draws them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: What each room may import of the others.
ARROWS = {
    "telemetry": set[str](),
    "registry": {"telemetry"},
    "editing": {"registry.manifests", "registry.errors", "registry.bases"},
    "serving": {"registry", "telemetry", "editing.deltas", "editing.models.loading"},
    "workers": {"registry", "telemetry", "editing"},
    "app": {
        "registry",
        "telemetry",
        "serving.client",
        "serving.memory",
        "serving.protocol",
        "serving.status",
        "workers",
        "benchmarks",
    },
    "benchmarks": {"registry", "editing", "serving", "app", "workers.tether"},
}
#: Within app/, of the workers only the side of the queue, without torch.
QUEUE_SIDE = {
    "workers.archives",
    "workers.connection",
    "workers.contents",
    "workers.dispatch",
    "workers.embedded",
    "workers.health",
    "workers.inputs",
    "workers.notices",
    "workers.preprocessing",
    "workers.recipes",
    "workers.supervisor",
    "workers.tether",
    "workers.worker",
}


#: What a command works with itself, without queue and server.
COMMANDS = {"workers.offline"}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("room", ARROWS)
def test_no_import_climbs(room: str) -> None:
    climbing = [
        f"{file.relative_to(ROOT)} imports {module}"
        for file in (ROOT / room).rglob("*.py")
        for module in imports(file)
        if module.split(".")[0] in ARROWS
        and module.split(".")[0] != room
        and not any(module == arrow or module.startswith(f"{arrow}.") for arrow in ARROWS[room])
    ]
    assert climbing == []


def test_app_uses_the_queue_side_of_the_workers_alone() -> None:
    used = {m for f in (ROOT / "app").rglob("*.py") for m in imports(f) if m.startswith("workers")}
    assert used <= QUEUE_SIDE | COMMANDS
