"""From the name in a request to the version that serves it, decided once at admission."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection

from app.inference.schemas import ProxyBody
from registry import endpoints, versions
from registry.bases import Base, base_of
from registry.endpoints import Endpoint
from registry.errors import Gone, NotFound, UnprocessableRequest
from registry.manifests import VersionManifest
from registry.signatures import check_servable
from serving.protocol import Proxy, VersionRef


@dataclass(frozen=True)
class Resolved:
    """The version that serves a request, and the generation of the endpoint that named it.

    ``created_at``: when what ``model`` names was made; 0 for a base.
    """

    model: str
    manifest: VersionManifest
    generation: int | None
    created_at: float


@dataclass(frozen=True)
class Admitted:
    """What answers a request: a version, by proxy decoding with two more."""

    resolved: Resolved
    proxy: Proxy | None

    @property
    def headers(self) -> dict[str, str]:
        headers = {"errata-version": self.resolved.manifest.id}
        if self.resolved.generation is not None:
            headers["errata-generation"] = str(self.resolved.generation)
        if self.proxy is not None:
            headers["errata-expert"] = self.proxy.expert.id
            headers["errata-anti-expert"] = self.proxy.anti_expert.id
        return headers


def admit(
    connection: Connection,
    bases: Mapping[str, Base],
    tenant: str,
    model: str,
    proxy: ProxyBody | None,
    user: str,
) -> Admitted:
    """The versions of ``model`` and of its proxies.

    Raises:
        UnprocessableRequest: they stand on different bases; and what ``resolve`` raises.
    """
    resolved = resolve(connection, bases, tenant, model, user)
    if proxy is None:
        return Admitted(resolved, None)
    base = resolved.manifest.base
    refs = {}
    for role, name in (("expert", proxy.expert), ("anti_expert", proxy.anti_expert)):
        manifest = resolve(connection, bases, tenant, name, user, f"proxy.{role}").manifest
        if manifest.base != base:
            raise UnprocessableRequest(
                f"proxy.{role} {name!r} stands on base {manifest.base.name!r}, model {model!r} on"
                f" {base.name!r}; proxy decoding needs versions of one base",
                param=f"proxy.{role}",
            )
        refs[role] = VersionRef.of(manifest)
    return Admitted(resolved, Proxy(**refs, alpha=proxy.alpha))


def resolve(
    connection: Connection,
    bases: Mapping[str, Base],
    tenant: str,
    model: str,
    user: str,
    param: str = "model",
) -> Resolved:
    """``model`` is an endpoint, a version's id or ``base_<name>``; ``param`` is where it stands.

    Raises:
        NotFound (model_not_found), Gone (deleted version), VersionUnavailable (its base is not
        loaded here, or has changed on disk; no trusted key signed it).
    """
    if model.startswith("base_"):
        base = bases.get(model.removeprefix("base_"))
        if base is None:
            raise _no_model(model, param)
        return Resolved(model, VersionManifest(base.ref), None, 0.0)
    if model.startswith("ver_"):
        version_id, generation, created_at = model, None, None
    else:
        try:
            endpoint = endpoints.get_endpoint(connection, tenant, model)
        except NotFound:
            raise _no_model(model, param) from None
        version_id, generation = choose(endpoint, user), endpoint.generation
        created_at = endpoint.created_at
    try:
        version = versions.get_version(connection, tenant, version_id)
    except NotFound:
        raise _no_model(model, param) from None
    if version.status == versions.DELETED:
        raise Gone(f"version {version_id!r} was deleted", code="version_deleted", param=param)
    base_of(bases, version_id, version.manifest.base)
    check_servable(connection, tenant, version.manifest)
    made = version.created_at if created_at is None else created_at
    return Resolved(model, version.manifest, generation, made)


def choose(endpoint: Endpoint, user: str) -> str:
    """A split's version for this user: ordered buckets of a stable hash, so that a growing share
    moves each user once."""
    state = endpoint.state
    if len(state) == 1:
        return state[0].version
    digest = hashlib.sha256(f"{endpoint.tenant}/{endpoint.name}/{user}".encode()).digest()
    point = int.from_bytes(digest[:8], "big") / 2**64 * sum(target.weight for target in state)
    for target in reversed(state):  # the canary, last in the split, owns the lowest buckets
        point -= target.weight
        if point < 0:
            return target.version
    return state[0].version


def _no_model(model: str, param: str) -> NotFound:
    return NotFound(
        f"model {model!r} does not exist; GET /v1/models lists endpoints and bases,"
        " GET /v1/versions lists versions",
        param=param,
        code="model_not_found",
    )
