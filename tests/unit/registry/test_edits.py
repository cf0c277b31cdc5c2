"""An edit is carried while its delta, or one made in its place, is in the stack."""

from registry.edits import edited
from registry.manifests import VersionManifest
from registry.versions import Version
from tests.unit.registry.conftest import BASE, TENANT

EDIT = {"kind": "edit", "edit_count": 1}


def version(*stack: str, **recipe: object) -> Version:
    return Version(TENANT, VersionManifest(BASE, stack, (), recipe), "ready", None, 0.0)


def test_edits_of_the_stack_are_carried_newest_first() -> None:
    base, one, two = version(), version("a", **EDIT), version("a", "b", **EDIT)
    assert list(edited([two, one, base])) == [(two, "b"), (one, "a")]
    assert list(edited([base])) == []


def test_one_whose_delta_was_taken_out_is_not() -> None:
    base, one, two = version(), version("a", **EDIT), version("a", "b", **EDIT)
    without = version("b", kind="revert")
    assert list(edited([without, two, one, base])) == [(two, "b")]


def test_one_that_was_trained_anew_is_carried_by_what_replaced_it() -> None:
    one = version("a", **EDIT)
    two = version("b", **EDIT, replaces="a")
    three = version("c", **EDIT, replaces="b")
    found = list(edited([three, two, one, version()]))
    assert found == [(three, "c"), (two, "c"), (one, "c")]
    assert list(edited([version(kind="revert"), three, two, one])) == []


def test_jobs_without_edits_carry_none() -> None:
    surgery = version("a", kind="edit", edit_count=0)
    assert list(edited([surgery, version()])) == []
