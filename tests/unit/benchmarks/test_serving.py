"""The serving bench at tiny sizes: its structure and the equality of tokens, never its times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks.serving.peers import first_fit_decreasing
from benchmarks.serving.report import plot, table
from benchmarks.serving.run import run
from benchmarks.serving.timing import Duel, fastest
from benchmarks.serving.workload import FULL, QUICK, drawing, lengths
from registry.errors import InvalidRequest

#: Compared in fp32 with every rival that answers: their greedy tokens must be the engine's.
TOLD = (
    "prefill_vs_padded",
    "prefill_vs_sorted",
    "prefill_vs_one_by_one",
    "prefill_vs_bins",
    "prefill_vs_bins_96",
    "gpt2_prefill_vs_padded",
    "gpt2_prefill_vs_bins",
    "generate_vs_generate_batch",
    "invariant_mode_cost",
    "mixed64_vs_peft",
    "mixed64_vs_peft_equal_lengths",
)
UNTOLD = (
    "prefill_share_of_linear_limit",
    "mixed64_vs_base",
    "mixed8_dense_vs_base",
    "memory_overhead_256",
    "bfloat16_vs_float32",
    "generate_vs_generate_batch_bfloat16",
    "bfloat16_equal_completions",
    "ttft_p50_ms",
    "prefill_share_of_product_rate",
)
PARTS = ("prefill", "generate", "mixed", "memory", "invariance", "bfloat16", "gpt2", "limits")


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return run(QUICK, PARTS, torch.get_num_threads(), "float32", Console(quiet=True))


def test_every_figure_is_there(result: dict[str, Any]) -> None:
    assert set(TOLD + UNTOLD) <= result["figures"].keys()
    assert set(result["detail"]["seconds"]) == set(PARTS)


@pytest.mark.parametrize("name", TOLD)
def test_rivals_give_the_same_tokens(result: dict[str, Any], name: str) -> None:
    found = result["detail"][name]
    assert len(found["rival"]) == len(found["ours"]) == QUICK.rounds
    assert found["compared_prompts"] == QUICK.rounds * QUICK.prompts
    assert found["equal_prompts"] == found["compared_prompts"]


def test_every_edit_changes_what_is_said(result: dict[str, Any]) -> None:
    assert result["detail"]["prompts_that_their_edit_changes"] == QUICK.versions


def test_the_invariant_mode_gives_each_request_its_own_bits(result: dict[str, Any]) -> None:
    found = result["detail"]["invariant_mode"]
    assert found["identical_steps"] == found["steps"] > 0
    assert result["figures"]["default_mode_argmax_flips"] == 0


def test_the_table_and_the_picture_show_it(result: dict[str, Any], tmp_path: Path) -> None:
    figures, detail = result["figures"], result["detail"]
    assert table(figures, detail).row_count == len(figures)
    plot(tmp_path / "serving.png", figures, detail)
    assert (tmp_path / "serving.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no part is called 'prefil'"):
        run(QUICK, ["prefil"], 1, "float32", Console(quiet=True))


def test_the_prompts_are_those_of_the_record() -> None:
    sizes = lengths(FULL.prompts, FULL.longest)
    assert (sum(sizes), FULL.prompts * max(sizes)) == (2296, 16384)
    draw = drawing(sizes, FULL.vocabulary)
    first, second = draw(), draw()
    assert [len(prompt) for prompt in first] == [len(prompt) for prompt in second] == sizes
    assert first != second
    assert first == drawing(sizes, FULL.vocabulary)()


def test_first_fit_decreasing() -> None:
    assert first_fit_decreasing([3, 8, 2, 5, 4], 8) == [[1], [3, 0], [4, 2]]


def test_a_ratio_is_the_median_over_pairs() -> None:
    assert Duel(rival=[2.0, 9.0, 4.0], ours=[1.0, 1.0, 1.0]).ratio == 4


def test_the_quickest_variant_is_found() -> None:
    def slow(prompts: list[list[int]]) -> list[list[int]]:
        return [sorted(range(200_000), key=lambda i: -i)]

    def quick(prompts: list[list[int]]) -> list[list[int]]:
        return []

    chosen, seconds = fastest({"slow": slow, "quick": quick}, lambda: [[1]])
    assert chosen == "quick"
    assert seconds.keys() == {"slow", "quick"}
