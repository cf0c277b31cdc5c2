"""The fine-tuning bench at tiny sizes."""

from __future__ import annotations

from dataclasses import replace
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks.finetuning.memory import PeakMemory
from benchmarks.finetuning.report import plot, tables
from benchmarks.finetuning.run import run
from benchmarks.finetuning.workload import BIRDS, FULL, QUICK, examples, new_relation
from editing.atlas.facts import read_facts
from registry.errors import InvalidRequest

SILENT = Console(quiet=True)
METHODS = ["lora", "ia3"]


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return run(QUICK, [], METHODS, 1, "cpu", SILENT)


def test_every_part_gives_its_figures(result: dict[str, Any]) -> None:
    figures = result["figures"]
    assert 0 <= figures["lora_new_relation"] <= 1
    assert 0 <= figures["lora_old_facts_lost"] <= 1
    assert figures["packed_vs_padded_trainer"] > 0
    assert {"packed_vs_group_by_length", "packed_vs_flattened_trainer"} <= set(figures)


def test_every_way_to_train_takes_the_same_steps(result: dict[str, Any]) -> None:
    """The Trainer's losses, padded and flattened, are those of packed rows."""
    assert result["figures"]["packed_largest_loss_difference"] < 1e-5
    losses = result["detail"]["packing"]["runs"]["packed"]["losses"]
    assert len(losses) == QUICK.steps
    assert len(set(losses)) == len(losses)


def test_a_run_that_was_broken_off_goes_on(tmp_path: Path) -> None:
    """What was measured is not measured again, and never taken for another setting's."""
    file = tmp_path / "rows.jsonl"
    first = run(QUICK, ["methods"], ["ia3"], 1, "cpu", SILENT, kept=file)
    with file.open("ab") as stream:
        stream.write(b'{"method":"lo')  # a kill in the midst of writing
    second = run(QUICK, ["methods"], METHODS, 1, "cpu", SILENT, kept=file)
    rows = {row["method"]: row for row in second["detail"]["methods"]}
    assert [*rows] == METHODS
    assert [rows["ia3"]] == first["detail"]["methods"]  # to its seconds
    assert len(file.read_text().splitlines()) == 3
    with pytest.raises(InvalidRequest, match=r"rows\.jsonl.*other settings"):
        run(replace(QUICK, seed=2), ["methods"], METHODS, 1, "cpu", SILENT, kept=file)


def test_every_method_has_its_row(result: dict[str, Any]) -> None:
    rows = {row["method"]: row for row in result["detail"]["methods"]}
    assert [*rows] == METHODS
    assert not any("error" in row for row in rows.values())
    assert rows["ia3"]["delta_bytes"] < rows["lora"]["delta_bytes"]


def test_tables_and_a_picture_are_made(result: dict[str, Any], tmp_path: Path) -> None:
    titles = [table.title for table in tables(result["figures"], result["detail"])]
    assert titles == ["Figures", "A new relation", "Training on texts of skewed lengths"]
    plot(tmp_path / "found.png", result["detail"])
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


def test_the_relation_is_one_that_no_fact_gives_away() -> None:
    relation = new_relation(FULL.facts, 1)
    assert len(dict(relation)) == FULL.facts
    assert not {fact.object for fact in read_facts()} & set(BIRDS.objects)
    assert relation != new_relation(FULL.facts, 2)
    rows = examples(relation)
    assert len(rows) == FULL.facts * len(BIRDS.trained)
    assert all(row["completion"].removesuffix(".") in BIRDS.objects for row in rows)


def test_memory_is_that_of_the_block() -> None:
    with PeakMemory(torch.device("cpu")) as memory, mmap(-1, 2**26) as fresh:  # no freed block
        fresh.write(b"\1" * 2**26)
    assert memory.bytes is not None
    assert 2**25 < memory.bytes < 2**28


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="no part is called 'x'"):
        run(QUICK, ["x"], [], 1, "cpu", SILENT)
    with pytest.raises(InvalidRequest, match="no method is called 'y'"):
        run(QUICK, [], ["y"], 1, "cpu", SILENT)
