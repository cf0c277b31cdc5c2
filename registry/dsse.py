"""DSSE, the envelope of in-toto and Sigstore: what is signed is the payload together with its type.

PAE(type, payload) = "DSSEv1" SP LEN(type) SP type SP LEN(payload) SP payload, lengths in decimal.
(https://github.com/secure-systems-lab/dsse, protocol.md)
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

SIGNATURE_BYTES = 64  # of Ed25519


@dataclass(frozen=True)
class Signature:
    """Who signed, by the key's id, and the bytes of the signature."""

    keyid: str
    sig: bytes

    def to_json(self) -> dict[str, str]:
        return {"keyid": self.keyid, "sig": base64.b64encode(self.sig).decode()}

    @classmethod
    def from_json(cls, body: Any) -> Signature:
        """Raises ValueError: it is no signature by Ed25519."""
        if not isinstance(body, dict) or body.keys() != {"keyid", "sig"}:
            raise ValueError("a signature has the fields keyid and sig")
        keyid, sig = body["keyid"], from_base64(body["sig"])
        if not isinstance(keyid, str) or not 0 < len(keyid) <= 64 or not keyid.isprintable():
            raise ValueError("a signature's keyid is a text of at most 64 characters")
        if len(sig) != SIGNATURE_BYTES:
            raise ValueError(f"a signature has {SIGNATURE_BYTES} bytes, this one has {len(sig)}")
        return cls(keyid, sig)


def pae(payload_type: str, payload: bytes) -> bytes:
    """The bytes that are signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def envelope(payload_type: str, payload: bytes, signatures: Iterable[Signature]) -> dict[str, Any]:
    """A payload and its signatures, as every DSSE tool reads them."""
    return {
        "payloadType": payload_type,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [signature.to_json() for signature in signatures],
    }


def from_base64(text: Any) -> bytes:
    """Bytes in base64, of either alphabet. Raises ValueError."""
    if not isinstance(text, str):
        raise ValueError("base64 is expected")
    try:
        return base64.b64decode(text.translate(_STANDARD), validate=True)
    except binascii.Error as error:
        raise ValueError(f"base64 is expected: {error}") from None


_STANDARD = str.maketrans("-_", "+/")
