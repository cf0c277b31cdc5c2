"""Keys are told once, kept as a digest, and refused once they are expired or revoked."""

import time

import pytest
from sqlalchemy import select

from registry import keys, tables
from registry.database import Database
from registry.errors import Conflict, NotFound, Unauthorized
from registry.keys import Key
from tests.unit.registry.conftest import TENANT


def made(database: Database, name: str = "ci", **changes: float) -> tuple[Key, str]:
    with database.write() as connection:
        return keys.create_key(connection, TENANT, name, {"infer", "edit"}, actor="ada", **changes)


def authenticated(database: Database, token: str) -> Key:
    with database.read() as connection:
        return keys.authenticate(connection, token)


def test_a_key_is_known_again_and_not_kept(database: Database) -> None:
    key, token = made(database)
    assert authenticated(database, token) == key
    assert (key.tenant, key.name, key.status) == (TENANT, "ci", "live")
    assert key.scopes == {"infer", "edit"}
    with database.read() as connection:
        row = connection.execute(select(tables.api_keys)).one()
    secret = token.removeprefix(keys.PREFIX).partition("_")[2]
    assert len(secret) >= 43
    assert not any(secret in str(value) for value in row)


@pytest.mark.parametrize("change", ["", "x", "é", "\0"])
def test_what_is_not_the_whole_key_is_refused(database: Database, change: str) -> None:
    _, token = made(database)
    for wrong in (token[:-1] + change, token + (change or "x"), f"{keys.PREFIX}{change}"):
        with pytest.raises(Unauthorized, match="not known") as refusal:
            authenticated(database, wrong)
        assert (refusal.value.status, refusal.value.code) == (401, "invalid_api_key")


def test_one_key_is_not_another(database: Database) -> None:
    (first, token), (second, _) = made(database), made(database, "cd")
    swapped = token.replace(first.id.removeprefix("key_"), second.id.removeprefix("key_"))
    with pytest.raises(Unauthorized):
        authenticated(database, swapped)


def test_an_expired_and_a_revoked_key_are_refused_by_name(database: Database) -> None:
    _, short = made(database, expires_at=time.time() - 1)
    with pytest.raises(Unauthorized, match=r"'ci' .* is expired"):
        authenticated(database, short)
    key, token = made(database)
    with database.write() as connection:
        assert keys.has_live_key(connection)
        with pytest.raises(NotFound):
            keys.revoke_key(connection, "another", key.id, actor="ada")
        revoked = keys.revoke_key(connection, TENANT, key.id, actor="ada")
        assert keys.revoke_key(connection, TENANT, key.id, actor="ada") == revoked
        assert not keys.has_live_key(connection)
    with pytest.raises(Unauthorized, match=r"'ci' .* is revoked"):
        authenticated(database, token)


def test_a_name_is_one_live_key_s(database: Database) -> None:
    key, _ = made(database)
    with pytest.raises(Conflict, match=f"that of the live key {key.id}"):
        made(database)
    with pytest.raises(Conflict, match="this service itself"):
        made(database, "local")
    with database.write() as connection:
        keys.revoke_key(connection, TENANT, key.id, actor="ada")
    made(database)


def test_keys_are_listed_by_tenant(database: Database) -> None:
    (first, _), (second, _) = made(database), made(database, "cd")
    with database.write() as connection:
        other, _ = keys.create_key(connection, "another", "ci", {"admin"}, actor="ada")
        assert keys.list_keys(connection, TENANT).items == (second, first)
        page = keys.list_keys(connection, TENANT, limit=1)
        assert (page.items, page.has_more) == ((second,), True)
        assert keys.list_keys(connection, TENANT, after=second.id).items == (first,)
        assert keys.list_keys(connection, None).items == (other, second, first)
        with pytest.raises(NotFound):
            keys.get_key(connection, TENANT, other.id)
