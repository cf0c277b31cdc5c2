"""Signatures as the Standard Webhooks specification has them."""

from __future__ import annotations

import base64
import hashlib
import hmac

from registry.webhooks import SECRET_PREFIX


def signed_headers(message_id: str, timestamp: int, payload: bytes, secret: str) -> dict[str, str]:
    """The three headers by which a receiver knows who sent what, and when.

    ``v1,`` base64(HMAC-SHA256(key, id.timestamp.payload)), where the key is what follows ``whsec_``
    in the secret, in base64.
    """
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    content = f"{message_id}.{timestamp}.".encode() + payload
    signature = base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{signature}",
    }
