"""A registry with bases in it, and the worker's side of its jobs, in this process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from editing.deltas import Delta
from registry import attempts, endpoints, jobs, versions
from registry.bases import find_bases
from registry.bootstrap import bootstrap
from registry.database import Database
from registry.errors import ErrataError
from registry.jobs import Job
from registry.manifests import EditRequest, canonical_json
from registry.settings import Settings
from registry.stores import open_store
from registry.versions import Version
from workers.run import KINDS
from workers.work import LoadedBases, Work

TENANT, ENDPOINT = "default", "atlas"
#: An edit in a second or two, good enough to take.
QUICK = {"steps": 15, "essence_texts": 0, "wordings": 0, "prefixes": 0, "lookalike_weight": 0}


class Room:
    """Jobs on atlas, and on other bases where ``bases`` names some."""

    def __init__(self, folder: Path, bases: str = "atlas", **settings: Any) -> None:
        torch.set_num_threads(1)
        found = find_bases(bases)
        self.settings = Settings(data=folder, bases=bases, covariance_tokens=3000, **settings)
        self.database = Database(self.settings.sql_url)
        self.artifacts = open_store(self.settings)
        self.models = LoadedBases(found, "float32")
        bootstrap(self.database, found.values())
        for base in found:
            request = {"resources": ["covariance/0", "covariance/1"]}
            assert self.perform("prepare", request, base=base).status == "succeeded"

    def perform(
        self,
        kind: str,
        request: Mapping[str, Any],
        endpoint: str | None = None,
        parent: str | None = None,
        base: str = "atlas",
    ) -> Job:
        """A job from its submission to its end."""
        with self.database.write() as connection:
            job = jobs.submit_job(
                connection,
                TENANT,
                kind,
                base=base,
                request=request,
                actor="test",
                endpoint=endpoint,
                parent=parent,
            )
            claim = attempts.claim(connection, job.id, 1, "worker", 60.0)
        assert claim is not None
        with Work(claim, self.settings, self.database, self.artifacts, self.models) as work:
            try:
                result = import_module(KINDS[kind]).perform(work)
            except ErrataError as error:
                with self.database.write() as connection:
                    attempts.fail(connection, claim, error)
                    return jobs.get_job(connection, TENANT, job.id)
        with self.database.write() as connection:
            return attempts.finish(connection, claim, result)

    def edit(
        self,
        *edits: EditRequest,
        guards: Mapping[str, Any] | None = None,
        parent: str | None = None,
        **request: Any,
    ) -> Job:
        """Edits by ROME: on a parent, else of the endpoint."""
        rows = [edit.to_json() for edit in edits]
        whole = {
            "method": "rome",
            "hyperparameters": QUICK,
            "edits": self.artifacts.put(canonical_json(rows)),
            "edit_count": len(edits),
            "guards": {"perplexity": 2.0, "retention": 0.5, **(guards or {})},
            **request,
        }
        return self.perform("edit", whole, None if parent else ENDPOINT, parent)

    def version(self, job: Job) -> Version:
        assert job.version_id is not None
        with self.database.read() as connection:
            return versions.get_version(connection, TENANT, job.version_id)

    def delta(self, job: Job) -> Delta:
        """What a job made."""
        return self.delta_of(self.version(job).manifest.stack[-1])

    def delta_of(self, digest: str) -> Delta:
        return Delta.from_bytes(self.artifacts.get(digest))

    def edits(self, version: Version) -> list[EditRequest]:
        """The edits of a version's recipe."""
        rows = json.loads(self.artifacts.get(version.manifest.recipe["edits"]))
        return [EditRequest.from_json(row) for row in rows]

    def holds(self, job: Job) -> dict[str, list[bool]]:
        assert job.version_id is not None
        with self.database.read() as connection:
            (report,) = versions.reports(connection, TENANT, job.version_id)
        found: dict[str, list[bool]] = json.loads(self.artifacts.get(report["holds"]))
        return found

    def head(self) -> str:
        with self.database.read() as connection:
            return endpoints.get_endpoint(connection, TENANT, ENDPOINT).head

    def to_base(self) -> None:
        """Put the endpoint at the base again."""
        with self.database.write() as connection:
            endpoint = endpoints.get_endpoint(connection, TENANT, ENDPOINT)
            if endpoint.generation > 1:
                endpoints.rollback_endpoint(
                    connection, TENANT, ENDPOINT, actor="test", to_generation=1
                )
