"""Recipes that came from elsewhere, where a request would have them run again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from app.history.schemas import Revert
from app.history.submit import check_revert
from app.services import Caller, Services
from registry.bases import find_bases
from registry.errors import UnprocessableRequest
from registry.keys import SCOPES
from registry.manifests import VersionManifest
from registry.versions import insert_version

TENANT = "default"
TUNED = {"kind": "fine_tune", "method": "lora", "options": {}, "rows": "0" * 64}
EDITED = {"kind": "edit", "method": "rome", "hyperparameters": {}, "edits": "0" * 64}


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"kind": "fine_tune"}, "method"),
        ({"kind": "edit"}, "method"),
        ({**TUNED, "method": ["lora"]}, "unhashable"),
        ({**TUNED, "rows": None}, "cannot be read"),
        ({**TUNED, "options": None}, "is not in the store"),
        ({**EDITED, "hyperparameters": None}, "cannot be read"),
        (EDITED, "is not in the store"),
        ({**EDITED, "edits": b"[1]"}, "cannot be read"),
        ({**EDITED, "edits": b"{"}, "cannot be read"),
        ({**TUNED, "rows": b"1"}, "cannot be read"),
        ({**TUNED, "rows": b'{"prompt": "x", "completion": "y"}', "options": 1}, "cannot be read"),
    ],
)
def test_what_cannot_be_read_cannot_run_again(
    services: Services, recipe: dict[str, Any], said: str
) -> None:
    base = find_bases("atlas")["atlas"]
    services = replace(services, bases={"atlas": base})
    recipe = {
        name: services.artifacts.put(value) if isinstance(value, bytes) else value
        for name, value in recipe.items()
    }
    first = VersionManifest(base.ref, ("a" * 64,), recipe={"kind": "edit"})
    head = VersionManifest(base.ref, ("a" * 64, "b" * 64), (first.id,), recipe)
    with services.database.write() as connection:
        for manifest in (first, head):
            insert_version(connection, TENANT, manifest)
    body = Revert(version=first.id, replay=True)
    with pytest.raises(UnprocessableRequest, match=said) as refused:
        check_revert(services, Caller(TENANT, "test", SCOPES), head.id, body)
    assert refused.value.code == "not_replayable"
    assert head.id in refused.value.message
