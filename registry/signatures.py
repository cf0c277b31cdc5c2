"""Signatures: rows beside the versions that only grow, and the refusal of versions without one.

Which keys are trusted, and with which this process signs, goes with the connection
(``Database``): whoever uses a version by ``registry.versions`` asks for its signature.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, insert, select

from registry import audit, tables
from registry.database import signer_of, trust_of
from registry.dsse import Signature
from registry.errors import Untrusted, VersionUnavailable
from registry.manifests import VersionManifest


@dataclass(frozen=True)
class Signed:
    """A row of the signatures table, and whether this process trusts it."""

    signature: Signature
    trusted: bool
    created_at: float


def list_signatures(
    connection: Connection, tenant: str, manifest: VersionManifest
) -> tuple[Signed, ...]:
    """A version's signatures, oldest first."""
    table, trust = tables.signatures, trust_of(connection)
    rows = connection.execute(
        select(table.c.keyid, table.c.sig, table.c.created_at)
        .where(table.c.tenant == tenant, table.c.version_id == manifest.id)
        .order_by(table.c.seq)
    )
    found = [(Signature(row.keyid, base64.b64decode(row.sig)), row.created_at) for row in rows]
    return tuple(
        Signed(signature, trust.counts(manifest, signature), created_at)
        for signature, created_at in found
    )


def signatures_of(
    connection: Connection, tenant: str, manifest: VersionManifest
) -> tuple[Signature, ...]:
    """As an archive carries them."""
    return tuple(signed.signature for signed in list_signatures(connection, tenant, manifest))


def signatures_by_version(
    connection: Connection, tenant: str, manifests: Iterable[VersionManifest]
) -> dict[str, tuple[Signature, ...]]:
    """Those of several versions, by their ids."""
    return {manifest.id: signatures_of(connection, tenant, manifest) for manifest in manifests}


def add_signatures(
    connection: Connection,
    tenant: str,
    manifest: VersionManifest,
    new: Iterable[Signature],
    *,
    actor: str | None = None,
) -> None:
    """Add signatures to a version that is there; what is there already is not added again.

    Args:
        actor: who did so, for the audit log; None where a job did, whose end stands there.
    """
    known = set(signatures_of(connection, tenant, manifest))
    for signature in new:
        if signature not in known:
            known.add(signature)
            connection.execute(
                insert(tables.signatures).values(
                    tenant=tenant,
                    version_id=manifest.id,
                    created_at=time.time(),
                    **signature.to_json(),
                )
            )
            if actor is not None:
                audit.record(
                    connection,
                    tenant,
                    actor=actor,
                    action="version.sign",
                    object=manifest.id,
                    after={"keyid": signature.keyid},
                )


def sign(connection: Connection, tenant: str, manifest: VersionManifest) -> None:
    """Sign a version that this process made, if it has a key for that."""
    key = signer_of(connection)
    if key is not None:
        add_signatures(connection, tenant, manifest, [key.sign(manifest)])


def check_trusted(connection: Connection, tenant: str, manifest: VersionManifest) -> None:
    """Refuse a version that no trusted key signed, where signatures are required.

    Raises:
        Untrusted
    """
    trust = trust_of(connection)
    if not trust.required or not manifest.stack:
        return
    found = signatures_of(connection, tenant, manifest)
    if not trust.accepts(manifest, found):
        raise Untrusted(
            f"version {manifest.id!r} has {_told(found)}, and this service asks for one"
            " (ERRATA_REQUIRE_SIGNATURES); sign it with a key that is trusted"
            " (`errata signing sign FILE VERSION`)"
        )


def check_servable(connection: Connection, tenant: str, manifest: VersionManifest) -> None:
    """As ``check_trusted``, for what answers requests. Raises VersionUnavailable."""
    try:
        check_trusted(connection, tenant, manifest)
    except Untrusted as error:
        raise VersionUnavailable(error.message) from None


def _told(found: Sequence[Signature]) -> str:
    if not found:
        return "no signature"
    return f"no signature of a trusted key (those it has name {', '.join(s.keyid for s in found)})"
