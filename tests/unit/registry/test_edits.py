"""An edit is carried while its delta, or one that holds it, is in the stack."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from registry.database import Database
from registry.edits import edited, origins
from registry.manifests import VersionManifest
from registry.versions import Version, in_order, insert_version, lineage
from tests.unit.registry.conftest import BASE, TENANT

EDIT = {"kind": "edit", "edit_count": 1}


def version(parents: Iterable[Version], *stack: str, **recipe: object) -> Version:
    ids = tuple(parent.id for parent in parents)
    return Version(TENANT, VersionManifest(BASE, stack, ids, recipe), "ready", None, 0.0)


BASE_VERSION = version([])
ONE = version([BASE_VERSION], "a", **EDIT)
TWO = version([ONE], "a", "b", **EDIT)


def test_edits_of_the_stack_are_carried_newest_first() -> None:
    assert list(edited([TWO, ONE, BASE_VERSION])) == [(TWO, "b"), (ONE, "a")]
    assert list(edited([BASE_VERSION])) == []


def test_one_whose_delta_was_taken_out_is_not() -> None:
    without = version([TWO], "b", kind="revert")
    assert list(edited([without, TWO, ONE, BASE_VERSION])) == [(TWO, "b")]


def test_one_that_was_trained_anew_is_carried_by_what_replaced_it() -> None:
    two = version([ONE], "b", **EDIT, replaces="a")
    three = version([two], "c", **EDIT, replaces="b")
    chain = [three, two, ONE, BASE_VERSION]
    assert list(edited(chain)) == [(three, "c"), (two, "c"), (ONE, "c")]
    assert [(o.delta, o.versions) for o in origins(chain)] == [("c", (ONE, two, three))]
    assert list(edited([version([three], kind="revert"), *chain])) == []


def test_jobs_without_edits_carry_none() -> None:
    surgery = version([BASE_VERSION], "a", kind="edit", edit_count=0)
    assert list(edited([surgery, BASE_VERSION])) == []


def test_of_equal_work_the_newest_counts() -> None:
    reverted = version([TWO], kind="revert")
    again = version([reverted], "a", **EDIT, replays=ONE.id)
    assert list(edited([again, reverted, TWO, ONE, BASE_VERSION])) == [(again, "a")]
    in_place = version([ONE], "a", **EDIT, replaces="a")
    assert list(edited([in_place, ONE, BASE_VERSION])) == [(in_place, "a"), (ONE, "a")]


def test_one_delta_holds_what_was_merged_and_flattened() -> None:
    other = version([ONE], "a", "c", kind="fine_tune")
    merged = version([TWO, other], "m", kind="merge")
    three = version([merged], "m", "d", **EDIT)
    flat = version([three], "f", kind="flatten")
    four = version([flat], "f", "e", **EDIT)
    chain = in_order([BASE_VERSION, ONE, TWO, other, merged, three, flat, four])
    carried = [(four, "e"), (three, "f"), (TWO, "f"), (ONE, "f")]
    assert list(edited(chain)) == carried
    assert [(o.delta, o.within, o.versions) for o in origins(chain)] == [
        ("m", "f", (merged,)),
        ("d", "f", (three,)),
        ("e", "e", (four,)),
    ]
    without = version([four], "e", kind="revert")
    assert list(edited(in_order([without, *chain]))) == [(four, "e")]


def test_what_was_flattened_beneath_itself_is_unfolded_once() -> None:
    head = version([ONE], "a", kind="flatten")
    assert [(o.delta, o.versions) for o in origins([head, ONE, BASE_VERSION])] == [("a", (head,))]
    chain = [ONE, BASE_VERSION]
    for place in range(40):  # each holds the one before it twice
        twice = version(chain[:1], *chain[0].manifest.stack * 2, kind="revert")
        chain = [version([twice], f"f{place}", kind="flatten"), twice, *chain]
    assert len(origins(chain)) == 41


def test_a_lineage_holds_each_ancestor_once_before_its_parents(database: Database) -> None:
    left, right = version([ONE], "a", "l", **EDIT), version([ONE], "a", "r", **EDIT)
    head = version([left, right], "m", kind="merge")
    with database.write() as connection:
        for made in (BASE_VERSION, ONE, left, right, head):
            insert_version(connection, TENANT, made.manifest)
        found = [v.id for v in lineage(connection, TENANT, head.id)]
    assert (found[0], found[-2:]) == (head.id, [ONE.id, BASE_VERSION.id])
    assert set(found[1:3]) == {left.id, right.id}
    assert len(found) == 5


class History:
    """Random work on a base, and beside every version what a plain reading says it carries."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.versions = [BASE_VERSION]
        #: By version, for each delta of its stack the edits that are in it.
        self.carried: dict[str, list[tuple[str, frozenset[str]]]] = {BASE_VERSION.id: []}
        for place in range(24):
            self._step(f"delta{place}")

    def _step(self, new: str) -> None:
        parent = self._random.choice(self.versions[-4:])
        held = self.carried[parent.id]
        match self._random.choice(["edit", "edit", "edit", "again", "revert", "flatten", "merge"]):
            case "again" if held:
                below, (replaced, inside) = held[:-1], held[-1]
                if self._maker(replaced) not in ("edit",):
                    return
                self._add([parent], [*below, (new, inside)], replaces=replaced, **EDIT)
            case "revert" if held:
                place = self._random.randrange(len(held))
                self._add([parent], held[:place] + held[place + 1 :], kind="revert")
            case "flatten" if len(held) > 1:
                together = frozenset[str]().union(*(inside for _, inside in held))
                self._add([parent], [(new, together)], kind="flatten")
            case "merge":
                other = self._random.choice(self.versions)
                both = frozenset[str]().union(*(i for _, i in (*held, *self.carried[other.id])))
                if other.id != parent.id and held and self.carried[other.id]:
                    self._add([parent, other], [(new, both)], kind="merge")
            case _:
                self._add([parent], [*held, (new, frozenset())], **EDIT)

    def _maker(self, delta: str) -> object:
        made = next(v for v in self.versions if v.manifest.stack and v.manifest.stack[-1] == delta)
        return made.manifest.recipe["kind"]

    def _add(
        self, parents: list[Version], held: list[tuple[str, frozenset[str]]], **recipe: object
    ) -> None:
        made = version(parents, *(delta for delta, _ in held), **recipe, n=len(self.versions))
        if recipe["kind"] == "edit":
            held = [*held[:-1], (held[-1][0], held[-1][1] | {made.id})]
        self.versions.append(made)
        self.carried[made.id] = held

    def chain(self, head: Version) -> tuple[Version, ...]:
        by_id = {v.id: v for v in self.versions}
        found = {head.id: head}
        waiting = [head]
        while waiting:
            for parent in waiting.pop().manifest.parents:
                if parent not in found:
                    found[parent] = by_id[parent]
                    waiting.append(by_id[parent])
        return in_order(found.values())


@pytest.mark.parametrize("seed", range(60))
def test_edits_and_origins_are_those_of_a_plain_reading(seed: int) -> None:
    history = History(seed)
    for head in history.versions:
        chain = history.chain(head)
        assert chain[0] == head
        places = {v.id: place for place, v in enumerate(chain)}
        assert all(places[p] > places[v.id] for v in chain for p in v.manifest.parents)
        held = history.carried[head.id]
        live = {v.id: delta for v, delta in edited(chain)}
        assert set(live) == frozenset[str]().union(*(inside for _, inside in held))
        assert all(live[edit] in [d for d, inside in held if edit in inside] for edit in live)
        found = origins(chain)
        assert list(dict.fromkeys(o.within for o in found)) == [delta for delta, _ in held]
        for origin in found:
            kinds = [v.manifest.recipe["kind"] for v in origin.versions]
            assert "flatten" not in kinds
            if kinds == ["edit"] * len(kinds):
                assert {v.id for v in origin.versions} <= set(live)
