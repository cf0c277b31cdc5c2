"""A point holds the process that passes it, once it is armed and as often as it says."""

import os
import subprocess
import sys
from pathlib import Path

from tests.service import wait_for

PASSES = """
from registry.failpoints import reach
for turn in range(4):
    reach("claimed")
    print(turn, flush=True)
"""


def start(folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "ERRATA_FAILPOINTS": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-c", PASSES], env=environment, stdout=subprocess.PIPE, text=True
    )


def test_it_holds_at_the_last_of_so_many_passes_until_it_is_let_go(tmp_path: Path) -> None:
    (tmp_path / "claimed").write_text("2")
    process = start(tmp_path)
    held = tmp_path / f"claimed.{process.pid}"
    wait_for(held.exists, 30)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["0\n", "1\n"]
    assert process.poll() is None
    held.unlink()
    said, _ = process.communicate(timeout=30)
    assert (said, process.returncode) == ("2\n3\n", 0)


def test_one_of_two_is_held(tmp_path: Path) -> None:
    (tmp_path / "claimed").write_text("0")
    processes = [start(tmp_path) for _ in range(2)]
    held = [tmp_path / f"claimed.{process.pid}" for process in processes]
    wait_for(lambda: any(file.exists() for file in held), 30)
    wait_for(lambda: any(process.poll() is not None for process in processes), 30)
    assert [file.exists() for file in held].count(True) == 1
    for file in held:
        file.unlink(missing_ok=True)
    assert [process.communicate(timeout=30)[0].count("\n") for process in processes] == [4, 4]


def test_a_point_that_is_not_armed_holds_nobody(tmp_path: Path) -> None:
    said, _ = start(tmp_path).communicate(timeout=30)
    assert said == "0\n1\n2\n3\n"
