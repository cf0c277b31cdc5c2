"""The artifact store that the settings name."""

from __future__ import annotations

from registry.artifacts import ArtifactStore
from registry.cached import CachedStore
from registry.objects import Objects
from registry.settings import Settings
from registry.waiting import wait_for


def open_store(settings: Settings) -> ArtifactStore:
    """The artifacts of ERRATA_ARTIFACTS: a folder, or an object store with a cache before it.

    Nothing is asked of an object store yet.

    Raises:
        InvalidRequest: the URL is of no store that is known.
    """
    folder = settings.artifact_folder
    if not settings.artifact_url:
        return ArtifactStore(folder)
    objects = Objects(settings.artifact_url, settings.artifacts_patience)
    return CachedStore(folder, objects, settings.artifacts_cache_bytes)


def await_store(settings: Settings) -> None:
    """Wait until the object store answers, if there is one, and see that it can be written to.

    Raises:
        InvalidRequest: as ``open_store``, or the bucket is missing, the credentials are wrong.
        Unavailable: it did not answer in ERRATA_WAIT_SECONDS.
    """
    if not settings.artifact_url:
        return
    objects = Objects(settings.artifact_url, settings.artifacts_patience)
    wait_for(f"the object store {settings.artifact_url}", objects.check, settings.wait_seconds)
