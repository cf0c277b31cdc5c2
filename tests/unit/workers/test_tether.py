"""A tethered process dies with its parent."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.workers.conftest import alive, until
from workers.tether import tethered

ROOT = Path(__file__).parents[3]
PARENT = """
import subprocess, sys
from workers.tether import tethered
child = subprocess.Popen(tethered({command!r}))
print(child.pid, flush=True)
sys.stdin.read()
"""
SLEEP = ["sleep", "600"]
TIED = [
    sys.executable,
    "-c",
    "import os, sys, time; {before}from workers.tether import tie_to_parent;"
    " tie_to_parent(os.getppid()); print('tied', flush=True); time.sleep(600)",
]


def start(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def test_command_dies_with_its_killed_parent() -> None:
    with start(PARENT.format(command=SLEEP)) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        until(lambda: name_of(child) == "sleep")
        parent.kill()
        until(lambda: not alive(child))


@pytest.mark.parametrize("platform", ["linux", "elsewhere"])
def test_python_child_ties_itself(platform: str) -> None:
    before = "" if platform == "linux" else "sys.platform = 'elsewhere'; "
    tied = [word.replace("{before}", before) for word in TIED]
    code = PARENT.replace("tethered({command!r})", "{command!r}, stdout=subprocess.PIPE").replace(
        "print(child", "child.stdout.readline(); print(child"
    )
    with start(code.format(command=tied)) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.kill()
        parent.wait()
        until(lambda: not alive(child))


def test_command_keeps_its_pid_environment_and_status() -> None:
    command = ["sh", "-c", "echo $$ $WORD; exit 7"]
    with subprocess.Popen(
        tethered(command), stdout=subprocess.PIPE, text=True, env={**os.environ, "WORD": "ok"}
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read().split() == [str(process.pid), "ok"]
    assert process.returncode == 7


def test_orphan_does_not_start() -> None:
    command = tethered(["echo", "started"])
    command[4] = "1"  # not the parent
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 125
    assert done.stdout == ""
    assert "parent 1 is gone" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status"), [([], 2), (["x", "--", "ls"], 2), (["{me}", "--", "/no/such"], 127)]
)
def test_wrong_commands_say_so(arguments: list[str], status: int) -> None:
    words = [word.replace("{me}", str(os.getpid())) for word in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "workers.tether", *words],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert done.returncode == status
    assert done.stderr
