"""The serving bench's parts that need a running service, at tiny sizes."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from benchmarks.serving.run import run
from benchmarks.serving.workload import QUICK


def test_streams_and_swaps_come_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever service the environment speaks of: the bench's is another one."""
    monkeypatch.setenv("ERRATA_ARTIFACTS", "s3://nowhere/artifacts")
    monkeypatch.setenv("ERRATA_REQUIRE_KEYS", "true")
    threads = torch.get_num_threads()
    result = run(QUICK, ["http", "swaps"], threads, "float32", Console(quiet=True))
    figures, detail = result["figures"], result["detail"]
    assert figures.keys() == {
        "http_vs_engine_64",
        "http_vs_engine_64_atlas",
        "swap_failed",
        "swap_effect_p99_ms",
        "swap_intertoken_p99_ratio",
    }
    assert figures["swap_failed"] == 0
    assert detail["swaps"] == QUICK.swaps
    assert all(part["n"] > 0 for part in detail["intertoken_ms"]["swaps"])
    assert torch.get_num_threads() == threads
