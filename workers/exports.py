"""A version written down for others: as an adapter, a merged folder, or this project's archive."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from editing.deltas import compose
from editing.deltas.fit import read_fitting
from editing.exchange.huggingface import write_merged
from editing.exchange.names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ARTIFACTS,
    MANIFEST,
    PEFT,
)
from editing.exchange.peft import config_bytes, write_adapter
from editing.models.view import ModelView
from registry.archives import MEMBERS
from registry.artifacts import CHUNK_BYTES, ArtifactStore
from registry.dsse import Signature
from registry.errors import UnprocessableRequest
from registry.manifests import VersionManifest
from registry.versions import Version
from workers.archives import (
    MANIFEST_BYTES,
    MANIFEST_VALUES,
    VERSIONS,
    History,
    values_in,
)

Member = tuple[str, Iterable[bytes]]


@dataclass(frozen=True)
class Export:
    """The members of an archive, in their order, and what is to be said of them."""

    members: Iterable[Member]
    report: Mapping[str, Any]


def export_weights(
    view: ModelView,
    manifest: VersionManifest,
    store: ArtifactStore,
    asked: Mapping[str, Any],
    to: Path,
) -> Export:
    """A version as ``peft`` or ``huggingface``, written into a folder.

    Args:
        asked: ``format`` and, for peft, ``rank`` and ``round_rank``.

    Raises:
        UnprocessableRequest: an effect that the format does not hold; names module and part.
    """
    base = view.base.digest
    deltas = (read_fitting(store.get(digest), view.model, base) for digest in manifest.stack)
    effects = compose(delta.effects for delta in deltas)
    if asked["format"] == PEFT:
        adapter = write_adapter(view, effects, asked["rank"], asked["round_rank"])
        (to / ADAPTER_CONFIG).write_bytes(config_bytes(adapter))
        (to / ADAPTER_WEIGHTS).write_bytes(adapter.weights)
        report = dict(adapter.report)
    else:
        report = write_merged(view, effects, to)
    said = {"version": manifest.id, "base": manifest.to_json()["base"], **report}
    (to / MANIFEST).write_text(json.dumps(said, indent=2) + "\n")
    files = sorted(path for path in to.iterdir() if path.is_file())
    return Export([(file.name, _chunks(file)) for file in files], report)


def export_history(
    chain: Sequence[Version], signatures: Mapping[str, tuple[Signature, ...]], store: ArtifactStore
) -> Export:
    """A version (the last of its ancestry) as an archive from which it can be restored.

    Args:
        signatures: of each version, by its id.

    It holds the version's deltas and whatever the recipes name that is still kept. What was
    measured stays out: where the archive is imported it is measured again.

    Raises:
        NotFound: a delta is gone.
        UnprocessableRequest: it came from so much that no import would take the archive.
    """
    history = History(tuple(version.manifest for version in chain), signatures)
    found = sorted(history.needed)
    found += sorted(digest for digest in history.named - history.needed if store.holds(digest))
    listed = history.to_bytes()
    for count, most, what in (
        (len(chain), VERSIONS, "versions"),
        (len(listed), MANIFEST_BYTES, f"bytes of {MANIFEST}"),
        (values_in(listed), MANIFEST_VALUES, f"values in {MANIFEST}"),
        (1 + len(found), MEMBERS, "members"),
    ):
        if count > most:
            raise UnprocessableRequest(
                f"version {history.head.id} with all that it came from makes an archive of {count}"
                f" {what}, and an import takes {most}; export it as peft or huggingface",
                code="not_exportable",
            )
    members: list[Member] = [(MANIFEST, (listed,))]
    members += [(ARTIFACTS + digest, store.chunks(digest)) for digest in found]
    return Export(members, {"versions": len(chain), "artifacts": len(found)})


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        yield from iter(partial(stream.read, CHUNK_BYTES), b"")
