"""Object stores by URL, with credentials from the environment."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

from obstore.exceptions import BaseError
from obstore.store import from_url

from registry.errors import InvalidRequest

if TYPE_CHECKING:  # it is in the library's stubs alone
    from obstore.store import ObjectStore

SCHEMES = ("s3", "gs", "az", "file")
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "az": ("AZURE_STORAGE_ENDPOINT",),
}
CREDENTIALS = (
    "credentials are taken from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and"
    " AWS_ENDPOINT_URL, from GOOGLE_APPLICATION_CREDENTIALS, or from AZURE_STORAGE_ACCOUNT_NAME"
    " and AZURE_STORAGE_ACCOUNT_KEY"
)


def connect(url: str, patience: float) -> ObjectStore:
    """The store of a URL, of which nothing is asked yet; ``patience`` as Objects takes it.

    Raises:
        InvalidRequest: the URL is of no store, or lacks something.
    """
    scheme, _, rest = url.partition("://")
    if scheme not in SCHEMES:
        raise InvalidRequest(
            f"ERRATA_ARTIFACTS is {url!r}: {scheme}:// is no object store that is known; take one"
            f" of {', '.join(f'{known}://' for known in SCHEMES)}, or the path of a folder",
            param="ERRATA_ARTIFACTS",
        )
    if not rest.strip("/"):
        raise InvalidRequest(
            f"ERRATA_ARTIFACTS is {url!r} and names no bucket or folder; write it as"
            f" {scheme}://{'/folder' if scheme == 'file' else 'bucket/prefix'}",
            param="ERRATA_ARTIFACTS",
        )
    seconds = timedelta(seconds=patience)
    endpoints = [os.environ.get(name, "") for name in _ENDPOINTS.get(scheme, ())]
    try:
        if scheme == "file":
            return from_url(url, automatic_cleanup=True)
        return from_url(
            url,
            # one is deleted at a time, and not every S3 knows how to delete many
            config={"disable_bulk_delete": True} if scheme == "s3" else None,
            client_options={
                "allow_http": any(url.startswith("http://") for url in endpoints),
                "connect_timeout": timedelta(seconds=min(5.0, patience)),
                "timeout": seconds,
            },
            retry_config={
                "max_retries": 1000,
                "retry_timeout": seconds,
                "backoff": {
                    "init_backoff": timedelta(seconds=0.1),
                    "max_backoff": timedelta(seconds=2),
                    "base": 2,
                },
            },
        )
    except (BaseError, OSError, ValueError) as error:  # ValueError: of what is no URL
        raise InvalidRequest(
            f"ERRATA_ARTIFACTS: {url} cannot be used ({brief(error)}); {CREDENTIALS}",
            param="ERRATA_ARTIFACTS",
        ) from error


def brief(error: Exception) -> str:
    """What the library says, without its inner state and the store's XML."""
    return str(error).partition("\n")[0][:300]
