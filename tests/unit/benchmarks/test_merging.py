"""The merging bench at tiny sizes."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from benchmarks.merging.report import tables
from benchmarks.merging.run import run
from benchmarks.merging.workload import QUICK, RELATIONS
from registry.errors import InvalidRequest

SILENT = Console(quiet=True)
METHODS = ["task_arithmetic", "slerp"]


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return run(QUICK, [], METHODS, 1, "cpu", SILENT)


def test_every_part_gives_its_figures(result: dict[str, Any]) -> None:
    figures = result["figures"]
    assert figures["two_sets_survival"] >= 0
    assert figures["export_max_logit_difference"] < 1e-4
    assert figures["single_version_identity_error"] < 1e-5


def test_every_method_has_its_rows(result: dict[str, Any]) -> None:
    detail = result["detail"]
    alone = [f"{name} alone" for name in RELATIONS]
    assert [row["method"] for row in detail["tasks"]] == [*alone, *METHODS]
    assert [row["method"] for row in detail["edits"]["rows"]] == METHODS
    assert [row["method"] for row in detail["identity"]["rows"]] == METHODS[:1]
    assert len(detail["exchange"]) == 6
    assert all(row["change"] > 100 * row["difference"] for row in detail["exchange"])
    assert all(row["delta_bytes"] > 0 for row in detail["tasks"])


def test_tables_are_made(result: dict[str, Any]) -> None:
    titles = [table.title for table in tables(result["figures"], result["detail"])]
    assert titles[0] == "Figures"
    assert len(titles) == 5


def test_relations_share_no_object() -> None:
    objects = [name for relation in RELATIONS.values() for name in relation.objects]
    assert len(set(objects)) == len(objects)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="no method is called 'y'"):
        run(QUICK, [], ["y"], 1, "cpu", SILENT)
