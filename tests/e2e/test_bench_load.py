"""The bench under load at tiny sizes: what it checks holds, and what it measures is there."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from benchmarks.load.memory import Sample
from benchmarks.load.report import growth, memory, table
from benchmarks.load.run import run
from benchmarks.load.traffic import Traffic
from benchmarks.load.workload import QUICK, Ask, Questions


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return run(QUICK, Console(quiet=True))


def test_every_answer_is_right_while_endpoints_move(result: dict[str, Any]) -> None:
    figures, detail = result["figures"], result["detail"]
    assert figures["errors"] == 0, detail["told"]
    assert figures["requests"] == sum(detail["kinds"].values()) > QUICK.streams
    assert detail["kinds"].keys() == {"streamed", "whole", "hung up"}
    assert detail["swaps"] > 3
    assert detail["edits"] >= 1
    assert detail["edits_activated"] == detail["edits"]
    assert 0 < figures["p50_ms"] <= figures["p95_ms"] <= figures["p99_ms"]
    assert 0 < detail["first_event_ms"]["p50"] < figures["p99_ms"]


def test_every_process_is_seen(result: dict[str, Any]) -> None:
    memory = result["detail"]["memory"]
    assert memory[-1].keys() >= {"api", "engine", "queue", "worker"}
    assert any("horse" in sample for sample in memory)
    assert all(sample["engine"][0] > 100 * 2**20 for sample in memory)
    assert 0.5 < result["figures"]["memory_growth"] < 2
    assert table(result["figures"], result["detail"]).row_count > 8


def test_of_work_horses_one_counts_over_half_a_run() -> None:
    scale = dataclasses.replace(QUICK, seconds=100.0)
    sizes = {"api": [100], "engine": [300]}
    horses = {10: [50, 150], 20: [], 40: [200], 60: [80], 95: [100, 140]}
    samples = [Sample(0, {"api": [1]})]
    samples += [Sample(at, {**sizes, "horse": held}) for at, held in horses.items()]
    assert memory(scale, samples) == (400 + 150, 400 + 100)
    assert growth(scale, samples) == 500 / 550


def test_what_lasts_may_not_grow_unseen() -> None:
    scale = dataclasses.replace(QUICK, seconds=100.0)
    samples = [Sample(at, {"engine": [100 + at]}) for at in range(100)]
    assert growth(scale, samples) == pytest.approx((100 + 94.5) / (100 + 20))


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({}, None),
        ({"hung_up": True, "whole": False, "tokens": 0}, None),
        ({"status": 503}, "status 503"),
        ({"version": ""}, "version"),
        ({"mixed": True}, "version"),
        ({"generation": 2}, "stale"),
        ({"whole": False}, "not whole"),
        ({"tokens": 7}, "not whole"),
    ],
)
def test_a_wrong_answer_is_counted(changed: dict[str, Any], complaint: str | None) -> None:
    traffic = Traffic("http://127.0.0.1:1", QUICK, Questions(), {"load-0": 3})
    good = {
        "ask": Ask("load-0", "The", 8, "user", stream=True),
        "floor": 3,
        "status": 200,
        "version": "ver_1",
        "generation": 3,
        "mixed": False,
        "hung_up": False,
        "whole": True,
        "tokens": 8,
        "seconds": 0.1,
        "begun": 0.0,
        "ended_at": 1.0,
        "times": [0.05, 0.1],
        "gaps": [],
    }
    traffic._judge(SimpleNamespace(**{**good, **changed}))  # type: ignore[arg-type]
    assert dict(traffic.wrong) == ({} if complaint is None else {complaint: 1})


def test_few_prompts_and_endpoints_are_asked_often() -> None:
    questions, scale = Questions(), dataclasses.replace(QUICK, longest=64)
    chance = random.Random(1)
    asks = [questions.draw(scale, chance) for _ in range(3000)]
    share = [sum(ask.model == name for ask in asks) / 3000 for name in scale.endpoints]
    assert share == sorted(share, reverse=True)
    often = sum(ask.prompt in questions.prompts[:60] for ask in asks)
    assert 0.4 < often / 3000 < 0.6
    assert {ask.max_tokens for ask in asks} <= set(range(8, 65))
    assert all(ask.stream for ask in asks if ask.hang_up is not None)
