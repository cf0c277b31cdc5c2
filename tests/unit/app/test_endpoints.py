"""What the routes of endpoints look at first."""

from __future__ import annotations

import pytest
from fastapi import Response

from app.endpoints.routes import promote_endpoint
from app.endpoints.schemas import PromoteBody
from app.services import Caller, Services
from registry.endpoints import create_endpoint, move_endpoint
from registry.errors import Conflict, PreconditionFailed
from registry.keys import SCOPES
from registry.manifests import BaseRef, VersionManifest
from registry.moves import Target
from registry.versions import insert_version

TENANT = "default"


def test_a_promotion_by_an_old_etag_is_stale_whatever_is_there_now(services: Services) -> None:
    base = BaseRef("atlas", "0" * 64)
    with services.database.write() as connection:
        first, second = (
            insert_version(connection, TENANT, VersionManifest(base, (digest * 64,))).id
            for digest in "ab"
        )
        split = (Target(first, 0.9), Target(second, 0.1))
        create_endpoint(connection, TENANT, "facts", split, actor="test")
        move_endpoint(
            connection,
            TENANT,
            "facts",
            (Target(second),),
            generation=1,
            kind="promote",
            actor="somebody",
        )
    caller = Caller(TENANT, "test", SCOPES)
    for body in (None, PromoteBody(version=first)):
        with pytest.raises(PreconditionFailed, match="at generation 2, not 1"):
            promote_endpoint("facts", services, caller, Response(), '"1"', body)
        with pytest.raises(Conflict, match="only one of a split's") as refused:
            promote_endpoint("facts", services, caller, Response(), '"2"', body)
        assert refused.value.code == "not_split"
