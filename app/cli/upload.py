"""``errata upload``: from a folder of artifacts to the store of ERRATA_ARTIFACTS."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from registry.artifacts import ArtifactStore
from registry.errors import ArtifactCorrupt, InvalidRequest
from registry.settings import Settings
from registry.stores import open_store


def run(settings: Settings, folder: Path) -> None:
    """Put every artifact that is whole.

    Raises:
        InvalidRequest: there is no such folder, or the artifacts of the settings are in it.
        ArtifactCorrupt: some are damaged; all others were put.
    """
    if not folder.is_dir():
        raise InvalidRequest(f"{folder} is no folder; name one of artifacts: {settings.data}/…")
    if folder.resolve() == settings.artifact_folder.resolve():
        raise InvalidRequest(
            f"{folder} is where artifacts are kept or cached already; set ERRATA_ARTIFACTS to the"
            " URL of an object store"
        )
    source, store = ArtifactStore(folder), open_store(settings)
    put, damaged = 0, []
    for digest in source.digests():
        try:
            store.copy(source, digest)
            put += 1
        except ArtifactCorrupt as error:
            damaged.append(error.message)
    Console(highlight=False).print(f"{put} artifacts were put")
    if damaged:
        raise ArtifactCorrupt(f"{len(damaged)} were not put: {'; '.join(damaged)}")
