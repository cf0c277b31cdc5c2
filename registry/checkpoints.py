"""Where training stood: what it goes on from, and the versions it made on the way."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select

from registry import tables
from registry.attempts import Claim, fence
from registry.jobs import add_event
from registry.manifests import VersionManifest
from registry.versions import insert_version


@dataclass(frozen=True)
class Checkpoint:
    """A row of the checkpoints table.

    Attributes:
        step: steps that were done.
        state: digest of the artifact from which training goes on.
        version_id: the version of that moment; None where only the state was kept.
    """

    seq: int
    id: str
    job_id: str
    step: int
    state: str
    version_id: str | None
    metrics: Mapping[str, Any]
    created_at: float


def record_checkpoint(
    connection: Connection,
    claim: Claim,
    step: int,
    state: str,
    metrics: Mapping[str, Any],
    manifest: VersionManifest | None = None,
) -> None:
    """Keep where an attempt stands; states without a version before it are dropped.

    Raises:
        LeaseLost: the attempt was superseded.
    """
    job = fence(connection, claim)
    version_id = None
    if manifest is not None:
        version_id = insert_version(connection, job.tenant, manifest).id
    table = tables.checkpoints
    connection.execute(delete(table).where(table.c.job_id == job.id, table.c.version_id.is_(None)))
    checkpoint_id = "ftckpt_" + secrets.token_hex(16)
    connection.execute(
        insert(table).values(
            id=checkpoint_id,
            job_id=job.id,
            step=step,
            state=state,
            version_id=version_id,
            metrics=dict(metrics),
            created_at=time.time(),
        )
    )
    if version_id is not None:
        add_event(connection, job.id, "message", {"message": f"step {step}: version {version_id}"})


def list_checkpoints(connection: Connection, job_id: str) -> list[Checkpoint]:
    """A job's, from the first step to the last."""
    table = tables.checkpoints
    rows = connection.execute(
        select(table).where(table.c.job_id == job_id).order_by(table.c.step, table.c.seq)
    )
    return [_checkpoint(row) for row in rows]


def _checkpoint(row: Row[Any]) -> Checkpoint:
    return Checkpoint(**row._mapping)
