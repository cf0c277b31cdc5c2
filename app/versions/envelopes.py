"""Signatures that clients bring, compared with the version that they are for."""

from __future__ import annotations

from app.versions.schemas import Envelope
from registry.dsse import Signature, from_base64
from registry.errors import UnprocessableRequest
from registry.manifests import VersionManifest
from registry.signing import PAYLOAD_TYPE, Trust, payload_of


def read_envelope(body: Envelope, manifest: VersionManifest, trust: Trust) -> list[Signature]:
    """The signatures in an envelope of that version.

    Raises:
        UnprocessableRequest: it is another version's, or one of them is not a trusted key's.
    """
    try:
        payload = from_base64(body.payload)
    except ValueError as error:
        raise _refused("payload", str(error)) from None
    if body.payloadType != PAYLOAD_TYPE or payload != payload_of(manifest):
        raise _refused(
            "payload",
            f"it is not of version {manifest.id}; sign what GET"
            f" /v1/versions/{manifest.id}/signatures answers",
        )
    found = []
    for place, given in enumerate(body.signatures):
        param = f"signatures.{place}"
        try:
            signature = Signature.from_json(given.model_dump())
        except ValueError as error:
            raise _refused(param, str(error)) from None
        if signature.keyid not in trust.keys:
            known = ", ".join(trust.keys) or "none: ERRATA_TRUSTED_KEYS names no key"
            raise _refused(param, f"its key {signature.keyid} is not trusted here ({known})")
        if not trust.counts(manifest, signature):
            raise _refused(param, f"it is no signature by {signature.keyid} of this version")
        found.append(signature)
    if not found:
        raise _refused("signatures", "there is none")
    return found


def _refused(param: str, why: str) -> UnprocessableRequest:
    return UnprocessableRequest(f"{param}: {why}", param=param, code="signature_refused")
