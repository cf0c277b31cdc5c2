"""Who may do what."""

import pytest

from app.services import Caller
from registry.errors import Forbidden
from registry.keys import SCOPES


def test_a_caller_without_the_scope_is_told_which_one_is_needed() -> None:
    with pytest.raises(Forbidden, match="force needs a key with the scope 'admin'") as refusal:
        Caller("default", "ada", frozenset({"infer", "edit"})).require("admin", "force")
    assert (refusal.value.status, refusal.value.code) == (403, "permission_denied")


def test_on_loopback_everyone_is_the_owner() -> None:
    owner = Caller("default", "local", SCOPES)
    for scope in ("infer", "edit", "admin"):
        owner.require(scope, "anything")
