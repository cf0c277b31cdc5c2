"""API keys: who may ask for what, and as which tenant. Of a key only its SHA-256 is kept."""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, insert, or_, select, update

from registry import audit, tables
from registry.errors import Conflict, NotFound, Unauthorized
from registry.manifests import sha256
from registry.pages import Page, newest_first

#: What a key may allow: to ask models; to change them; to make keys, read the audit log and force.
SCOPES = frozenset({"infer", "edit", "admin"})
#: What every key begins with, so that one that leaked is found by those who look for such.
PREFIX = "er_"
#: Whom histories show where no key was shown.
RESERVED = frozenset({"local", "errata"})
UNKNOWN = sha256(b"")


@dataclass(frozen=True)
class Key:
    """A row of the keys table: never the key itself.

    Attributes:
        name: whom histories show.
        requests_per_minute, tokens_per_minute: None: as many as it likes.
    """

    seq: int
    id: str
    tenant: str
    name: str
    scopes: frozenset[str]
    requests_per_minute: int | None
    tokens_per_minute: int | None
    created_at: float
    expires_at: float | None
    revoked_at: float | None

    @property
    def status(self) -> str:
        """``live``, ``expired`` or ``revoked``."""
        if self.revoked_at is not None:
            return "revoked"
        has_expired = self.expires_at is not None and self.expires_at <= time.time()
        return "expired" if has_expired else "live"


def create_key(
    connection: Connection,
    tenant: str,
    name: str,
    scopes: Iterable[str],
    *,
    actor: str,
    expires_at: float | None = None,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
) -> tuple[Key, str]:
    """Make a key: its row, and what its owner is told once and nobody can be told again.

    Raises:
        Conflict: a live key has that name, or it is one that histories show for others.
    """
    table = tables.api_keys
    taken = connection.execute(
        select(table.c.id).where(table.c.tenant == tenant, table.c.name == name, _is_live())
    ).first()
    if taken is not None or name in RESERVED:
        holder = "this service itself" if taken is None else f"the live key {taken.id}"
        raise Conflict(f"the name {name!r} is that of {holder}; take another", code="name_taken")
    part = secrets.token_hex(8)
    token = f"{PREFIX}{part}_{secrets.token_urlsafe(32)}"
    connection.execute(
        insert(tables.api_keys).values(
            id=f"key_{part}",
            tenant=tenant,
            name=name,
            scopes=sorted(scopes),
            digest=sha256(token.encode()),
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            created_at=time.time(),
            expires_at=expires_at,
        )
    )
    told = {"name": name, "scopes": sorted(scopes), "expires_at": expires_at}
    audit.record(
        connection, tenant, actor=actor, action="key.create", object=f"key_{part}", after=told
    )
    return get_key(connection, tenant, f"key_{part}"), token


def authenticate(connection: Connection, token: str) -> Key:
    """The key that a token is.

    Raises:
        Unauthorized: there is none, or it is expired or revoked. Only who holds a key learns which.
    """
    table = tables.api_keys
    part = token.removeprefix(PREFIX).partition("_")[0]
    row = None
    if part.isalnum():
        row = connection.execute(select(table).where(table.c.id == f"key_{part}")).one_or_none()
    known = UNKNOWN if row is None else row.digest
    if not hmac.compare_digest(known, sha256(token.encode())) or row is None:
        raise Unauthorized("the API key is not known here; `errata keys create` makes one")
    key = _to_key(row)
    if key.status != "live":
        raise Unauthorized(
            f"API key {key.name!r} ({key.id}) is {key.status}; `errata keys create` makes another"
        )
    return key


def get_key(connection: Connection, tenant: str, key_id: str) -> Key:
    """Raises NotFound."""
    table = tables.api_keys
    row = connection.execute(
        select(table).where(table.c.tenant == tenant, table.c.id == key_id)
    ).one_or_none()
    if row is None:
        raise NotFound(f"key {key_id!r} does not exist", code="key_not_found")
    return _to_key(row)


def list_keys(
    connection: Connection, tenant: str | None, *, after: str | None = None, limit: int = 20
) -> Page[Key]:
    """Keys, newest first: of one tenant, or of all. Raises NotFound: there is no key ``after``."""
    table = tables.api_keys
    query = select(table)
    if tenant is not None:
        query = query.where(table.c.tenant == tenant)
    before: int | None = None
    if after is not None:
        last = connection.execute(query.where(table.c.id == after)).one_or_none()
        if last is None:
            raise NotFound(f"after: key {after!r} does not exist", param="after")
        before = last.seq
    return newest_first(connection, query, table.c.seq, _to_key, before=before, limit=limit)


def revoke_key(connection: Connection, tenant: str, key_id: str, *, actor: str) -> Key:
    """Refuse a key from now on; fine where it was revoked before. Raises NotFound."""
    table = tables.api_keys
    if get_key(connection, tenant, key_id).revoked_at is None:
        connection.execute(
            update(table)
            .where(table.c.tenant == tenant, table.c.id == key_id)
            .values(revoked_at=time.time())
        )
        audit.record(connection, tenant, actor=actor, action="key.revoke", object=key_id)
    return get_key(connection, tenant, key_id)


def has_live_key(connection: Connection) -> bool:
    """Whether any tenant has a key that would be taken."""
    table = tables.api_keys
    return connection.execute(select(table.c.id).where(_is_live()).limit(1)).first() is not None


def _is_live() -> ColumnElement[bool]:
    table = tables.api_keys
    return table.c.revoked_at.is_(None) & or_(
        table.c.expires_at.is_(None), table.c.expires_at > time.time()
    )


def _to_key(row: Row[Any]) -> Key:
    return Key(
        seq=row.seq,
        id=row.id,
        tenant=row.tenant,
        name=row.name,
        scopes=frozenset(row.scopes),
        requests_per_minute=row.requests_per_minute,
        tokens_per_minute=row.tokens_per_minute,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )
