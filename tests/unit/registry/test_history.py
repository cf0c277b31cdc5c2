"""What is taken out of a stack, and which recipes a replay runs again."""

from __future__ import annotations

import random

import pytest

from registry.edits import origins
from registry.errors import NotFound, UnprocessableRequest
from registry.history import check_depth, recipes, removal
from registry.versions import in_order
from tests.unit.registry.test_edits import BASE_VERSION, EDIT, ONE, TWO, History, version

THREE = version([TWO], "a", "b", "c", kind="fine_tune")
CHAIN = (THREE, TWO, ONE, BASE_VERSION)


def test_a_delta_of_the_stack() -> None:
    found = removal(CHAIN, delta="b")
    assert (found.delta, found.removed, found.below) == ("b", (TWO,), ("a",))
    assert found.later == (THREE,)
    assert removal(CHAIN, version=TWO.id, replay=True) == found


def test_one_of_several_edits_in_a_delta() -> None:
    both = version([ONE], "b", **EDIT, replaces="a")
    after = version([both], "b", "c", **EDIT)
    chain = (after, both, ONE, BASE_VERSION)
    for named in ({"version": ONE.id}, {"delta": "a"}):
        with pytest.raises(UnprocessableRequest, match='"replay": true') as refused:
            removal(chain, **named)
        assert refused.value.code == "replay_needed"
        found = removal(chain, **named, replay=True)
        assert (found.delta, found.removed, found.below) == (None, (ONE,), ())
        assert found.later == (both, after)
    assert removal(chain, delta="b").removed == (ONE, both)
    assert removal(chain, version=both.id, replay=True).later == (ONE, after)


def test_an_origin_of_a_flattened_delta() -> None:
    flat = version([THREE], "f", kind="flatten")
    chain = (flat, *CHAIN)
    with pytest.raises(UnprocessableRequest, match="shares delta f"):
        removal(chain, delta="b")
    found = removal(chain, version=TWO.id, replay=True)
    assert (found.delta, found.below, found.later) == (None, ("a",), (THREE,))
    assert removal(chain, delta="f").removed == (ONE, TWO, THREE)


def test_what_is_not_carried() -> None:
    without = version([TWO], "b", kind="revert", delta="a")
    for named in ({"delta": "a"}, {"version": ONE.id}, {"version": without.id}):
        with pytest.raises(NotFound) as refused:
            removal((without, TWO, ONE, BASE_VERSION), **named)
        assert refused.value.param == next(iter(named))


def test_recipes_that_cannot_run_again() -> None:
    merged = version([TWO, THREE], "m", kind="merge")
    chain = in_order([merged, *CHAIN])
    with pytest.raises(UnprocessableRequest, match="'merge'"):
        recipes(chain, "name")
    assert removal(chain, delta="m", replay=True).later == ()
    assert recipes(CHAIN, "name") == (ONE, TWO, THREE)
    brought = version([BASE_VERSION], "x", "y", kind="import")
    with pytest.raises(UnprocessableRequest, match="delta x"):
        recipes((brought, BASE_VERSION), "name")


def test_a_stack_has_a_depth() -> None:
    check_depth(THREE, 4)
    with pytest.raises(UnprocessableRequest, match=f"/v1/versions/{THREE.id}/flatten"):
        check_depth(THREE, 3)


@pytest.mark.parametrize("seed", range(40))
def test_nothing_is_lost_but_what_is_taken_out(seed: int) -> None:
    history, chance = History(seed), random.Random(seed)
    for head in history.versions:
        chain = history.chain(head)
        found = origins(chain)
        if not found or any(
            v.manifest.recipe["kind"] == "merge" for o in found for v in o.versions
        ):
            continue
        chosen = chance.choice([v for origin in found for v in origin.versions])
        taken = removal(chain, version=chosen.id, replay=True)
        beneath = [v.id for o in found[: len(taken.below)] for v in o.versions]
        rest = [v.id for v in taken.later]
        assert taken.below == tuple(origin.delta for origin in found[: len(taken.below)])
        assert taken.removed == (chosen,)
        assert [v.id for o in found for v in o.versions if v.id != chosen.id] == beneath + rest
        if taken.delta is not None:
            assert taken.delta in head.manifest.stack
            assert removal(chain, delta=taken.delta) == taken
