"""Work done in this process on the data folder, without queue and server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from editing.datasets import read_file
from editing.deltas.fit import read_fitting
from editing.evaluation import Asked, evaluate
from editing.exchange.names import ERRATA
from editing.models.loading import load_model, load_tokenizer
from editing.models.view import ModelView
from registry.archives import write_zip
from registry.bases import Base, base_of, find_bases
from registry.database import existing_database
from registry.endpoints import get_endpoint
from registry.errors import InvalidRequest, NotFound
from registry.manifests import EditRequest, Fact, HarmPrompt, Question, VersionManifest
from registry.settings import Settings
from registry.signatures import signatures_by_version
from registry.stores import open_store
from registry.versions import ancestry, get_kept_version, get_ready_version
from workers.evidence import own_refusals
from workers.exports import export_history, export_weights


@dataclass(frozen=True)
class Target:
    """What is measured: ``kind`` is ``version``, ``endpoint`` or ``base``."""

    kind: str
    name: str


def evaluate_file(
    settings: Settings,
    tenant: str,
    target: Target,
    purpose: str,
    data: BinaryIO,
    limit: int | None = None,
    tell: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Measure a version on the rows of a file; ``tell`` hears what is being done.

    Returns:
        ``target``, ``version``, ``purpose``, ``rows`` and the ``metrics`` of ``evaluate``.

    Raises:
        NotFound: no such version, endpoint or base; UnprocessableRequest: a row that is wrong.
    """
    rows = [*read_file(purpose, data)][:limit]
    bases = find_bases(settings.bases)
    if target.kind == "base":
        if target.name not in bases:
            raise NotFound(f"base {target.name!r} is not among ERRATA_BASES ({', '.join(bases)})")
        manifest = VersionManifest(bases[target.name].ref)
    else:
        manifest = _manifest(settings, tenant, target)
    base = base_of(bases, manifest.id, manifest.base)
    view = _view(settings, base, tell)
    store = open_store(settings)
    stack = [read_fitting(store.get(one), view.model, base.digest) for one in manifest.stack]
    asked = replace(_asked(purpose, rows), refusals=own_refusals(settings, base))
    work = evaluate(view, stack, asked)
    try:
        while True:
            tell(next(work).message)
    except StopIteration as end:
        found: Mapping[str, Any] = end.value
    return {
        "target": target.name,
        "version": manifest.id,
        "purpose": purpose,
        "rows": len(rows),
        **found,
    }


def export_version(
    settings: Settings,
    tenant: str,
    version_id: str,
    asked: Mapping[str, Any],
    to: Path,
    tell: Callable[[str], None] = lambda message: None,
) -> Mapping[str, Any]:
    """Write a version into a folder: an adapter's files, a model's, or ``<version>.zip``.

    Args:
        asked: ``format``, and for peft ``rank`` and ``round_rank``.
        to: is made where it is not there; it must be empty.

    Returns:
        What an export job says in its metrics.

    Raises:
        InvalidRequest: the folder holds something; NotFound: no such version;
        UnprocessableRequest: an effect that the format does not hold, or more than an archive may.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InvalidRequest(f"{to} is no empty folder; name another")
    with existing_database(settings.sql_url) as database, database.read() as connection:
        manifest = get_ready_version(connection, tenant, version_id).manifest
        chain = ancestry(connection, tenant, version_id)
        signatures = signatures_by_version(connection, tenant, (v.manifest for v in chain))
    store = open_store(settings)
    if asked["format"] == ERRATA:
        made = export_history(chain, signatures, store)
        to.mkdir(parents=True, exist_ok=True)
        with (to / f"{version_id}.zip").open("w+b") as stream:
            write_zip(stream, made.members)
        return made.report
    view = _view(settings, base_of(find_bases(settings.bases), version_id, manifest.base), tell)
    tell("writing")
    to.mkdir(parents=True, exist_ok=True)
    return export_weights(view, manifest, store, asked, to).report


def _view(settings: Settings, base: Base, tell: Callable[[str], None]) -> ModelView:
    tell(f"loading {base.name}")
    torch.set_num_threads(settings.worker_threads)
    model = load_model(base, settings.dtype, settings.device)
    return ModelView(model, load_tokenizer(base), base)


def _manifest(settings: Settings, tenant: str, target: Target) -> VersionManifest:
    with existing_database(settings.sql_url) as database, database.read() as connection:
        version_id = target.name
        if target.kind == "endpoint":
            version_id = get_endpoint(connection, tenant, target.name).head
        return get_kept_version(connection, tenant, version_id).manifest


def _asked(purpose: str, rows: Sequence[Any]) -> Asked:
    match purpose:
        case "edits":
            return Asked(edits=[EditRequest.from_json(row) for row in rows])
        case "texts":
            return Asked(texts=rows)
        case "facts":
            return Asked(facts=[Fact(**row) for row in rows])
        case "harm":
            return Asked(harm=[HarmPrompt(**row) for row in rows])
        case _:
            return Asked(questions=[Question.from_json(row) for row in rows])
