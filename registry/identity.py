"""Which registry this is: an id that is drawn once and that no backup carries to another."""

from __future__ import annotations

import secrets
import time

from sqlalchemy import Connection, insert, inspect, select

from registry import tables
from registry.artifacts import ArtifactStore
from registry.database import Database
from registry.errors import Conflict, InvalidRequest


def has_identity(connection: Connection) -> bool:
    """Whether the schema is there, and new enough to say which registry it is."""
    return inspect(connection).has_table(tables.identity.name)


def identity_of(connection: Connection) -> str | None:
    """The registry's id, where one was drawn."""
    found: str | None = connection.execute(select(tables.identity.c.id)).scalar_one_or_none()
    return found


def identify(connection: Connection) -> str:
    """The registry's id; drawn, within a transaction that may write, where there is none yet."""
    found = identity_of(connection)
    if found is None:
        found = "reg_" + secrets.token_hex(16)
        connection.execute(insert(tables.identity).values(id=found, created_at=time.time()))
    return found


def claim_store(
    database: Database, artifacts: ArtifactStore, *, adopt: bool = False, dry_run: bool = False
) -> None:
    """Make a store of artifacts a registry's, if it is nobody's yet.

    Args:
        adopt: take it from the registry that it is of.
        dry_run: only see whether it can be.

    Raises:
        Conflict: it is another registry's, which deletes there what it does not reach itself.
        InvalidRequest: it cannot be written to.
    """
    with database.write() as connection:
        own = identify(connection)
    try:
        if dry_run:
            owner = own if adopt else artifacts.owner() or own
        else:
            owner = artifacts.claim(own, adopt=adopt) or own
    except OSError as error:
        raise InvalidRequest(
            f"ERRATA_ARTIFACTS: {artifacts} cannot be used ({error.strerror}); let it, or"
            " ERRATA_DATA, name a folder that this service may write to",
            param="ERRATA_ARTIFACTS",
        ) from error
    if owner != own:
        raise Conflict(
            f"the artifacts in {artifacts} are those of registry {owner}, which deletes there what"
            f" it does not reach itself, and {database} holds registry {own}. Let ERRATA_ARTIFACTS"
            " name a prefix or a folder that is nobody's, or it and ERRATA_DATABASE_URL (or"
            " ERRATA_DATA) what belongs together; if that registry is gone for good, `errata gc"
            " --adopt` makes its artifacts this one's"
        )
