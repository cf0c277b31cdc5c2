"""One attempt at work: its lease kept alive, its progress written, its cancellation noticed."""

from __future__ import annotations

import contextvars
import copy
import logging
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypeVar

from sqlalchemy import Connection

from editing.models.loading import load_model, load_tokenizer, weights_digest
from editing.models.view import ModelView
from registry import attempts, failpoints
from registry.artifacts import ArtifactStore
from registry.attempts import Claim
from registry.bases import Base
from registry.database import Database
from registry.errors import JobFailed, LeaseLost, Unavailable
from registry.manifests import Progress
from registry.settings import Settings
from registry.versions import Version, lineage
from telemetry import traces
from telemetry.logs import describe

logger = logging.getLogger("errata.work")
PROGRESS_SECONDS = 0.25
AGAIN_SECONDS = 0.5
T = TypeVar("T")


class Cancelled(Exception):
    """The user asked for the job to be cancelled."""


class Paused(Exception):
    """The user asked for the job to be paused."""


class Work:
    """What a job's module works with: the claim, the stores, the loaded bases.

    As a context manager it renews the lease from a thread until the block ends.
    """

    def __init__(
        self,
        claim: Claim,
        settings: Settings,
        database: Database,
        artifacts: ArtifactStore,
        models: LoadedBases,
    ) -> None:
        self.claim = claim
        self.settings = settings
        self.database = database
        self.artifacts = artifacts
        self.models = models
        self._ended = threading.Event()
        self._lost = threading.Event()
        self._cancelled = threading.Event()
        self._paused = threading.Event()
        self._heartbeat = threading.Thread(
            target=contextvars.copy_context().run, args=(self._beat,), name="lease", daemon=True
        )
        self._written_at = 0.0
        self._waiting: list[Progress] = []
        self._tried: list[Progress] = []
        self._chain: Sequence[Version] | None = None
        self._part: tuple[int, int] | None = None

    @property
    def chain(self) -> Sequence[Version]:
        """The lineage of the parent, which comes first. Raises JobFailed where there is none."""
        if self._chain is None:
            job, parent = self.claim.job, self.claim.parent
            if parent is None:
                raise JobFailed(f"job {job.id} names neither endpoint nor parent")
            with self.database.read() as connection:
                self._chain = lineage(connection, job.tenant, parent.id)
        return self._chain

    def part(
        self, chain: Sequence[Version], request: Mapping[str, Any], place: int, count: int
    ) -> Self:
        """The same attempt as if its job had asked for ``request`` on top of the first version of
        ``chain``: the place-th of ``count`` parts of the work. The first progress of a part is
        written at once.

        Args:
            chain: a lineage; what the attempt itself has made need not be in the registry.
        """
        work = copy.copy(self)
        job = replace(self.claim.job, request=request)
        work.claim = replace(self.claim, job=job, parent=chain[0])
        work._chain, work._part = chain, (place, count)
        work._written_at, work._waiting, work._tried = 0.0, [], []
        return work

    def __enter__(self) -> Self:
        self._heartbeat.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._heartbeat.join()

    def follow(self, steps: Generator[Progress, None, T]) -> T:
        """Run a generator to its end, writing its progress; returns what it returns."""
        with traces.span("method"):
            try:
                while True:
                    self.report(next(steps))
            except StopIteration as end:
                result: T = end.value
                return result
            finally:
                steps.close()

    def report(self, progress: Progress) -> None:
        """Write progress, at most four times a second; what has metrics waits and is not lost.

        Raises:
            Cancelled, Paused, LeaseLost: the work is to stop.
        """
        failpoints.reach("progress")
        if self._lost.is_set():
            raise LeaseLost(f"job {self.claim.job.id}: attempt {self.claim.attempt} lost its lease")
        if self._part is not None:
            progress = _within(progress, *self._part)
        stopped = self._cancelled.is_set() or self._paused.is_set()
        self._waiting = [*(earlier for earlier in self._waiting if earlier.metrics), progress]
        if stopped or time.monotonic() - self._written_at >= PROGRESS_SECONDS:
            self.write_progress()
        if stopped:
            raise Cancelled if self._cancelled.is_set() else Paused

    def write_progress(self) -> None:
        """Write the progress that waits; it waits on while the database is away.

        Raises:
            LeaseLost: another attempt took over.
        """
        self._written_at = time.monotonic()
        with suppress(Unavailable):
            with self.database.write() as connection:
                self._forget_written(connection)
                self._tried = list(self._waiting)
                for progress in self._tried:
                    attempts.record_progress(connection, self.claim, progress)
            self._waiting, self._tried = [], []

    def _forget_written(self, connection: Connection) -> None:
        """What was tried before was written after all if the answer to its commit was lost."""
        if self._tried and attempts.is_recorded(connection, self.claim, self._tried[-1]):
            written = {id(progress) for progress in self._tried}
            self._waiting = [p for p in self._waiting if id(p) not in written]

    def rest(self, seconds: float) -> None:
        """Do nothing but keep the lease for so long, or until the work is to stop."""
        deadline = time.monotonic() + seconds
        ended = (self._lost, self._cancelled, self._paused)
        while time.monotonic() < deadline and not any(event.is_set() for event in ended):
            time.sleep(min(0.1, seconds))

    def _beat(self) -> None:
        lease = self.settings.lease_seconds
        pause = lease / 4
        while not self._ended.wait(pause):
            pause = lease / 4
            try:
                with self.database.write() as connection:
                    job = attempts.heartbeat(connection, self.claim, lease)
                if job.cancel_requested:
                    self._cancelled.set()
                if job.pause_requested:
                    self._paused.set()
            except LeaseLost:
                self._lost.set()
                return
            except Unavailable as error:
                pause = min(pause, AGAIN_SECONDS)
                logger.warning("the lease was not renewed: %s", describe(error.__cause__ or error))


def _within(progress: Progress, place: int, count: int) -> Progress:
    """The progress of a part as that of the whole."""
    size = max(progress.total, 1)
    message = f"{place + 1} of {count}: {progress.message}"
    return replace(progress, done=place * size + progress.done, total=count * size, message=message)


class LoadedBases:
    """Bases in memory, each loaded once in this process and checked after every job."""

    def __init__(self, bases: dict[str, Base], dtype: str, device: str = "cpu") -> None:
        self._bases, self._dtype, self._device = bases, dtype, device
        self._views: dict[str, tuple[ModelView, str]] = {}

    def preload(self) -> None:
        for name in self._bases:
            self.view(name)

    def view(self, name: str) -> ModelView:
        """The base's view.

        Raises:
            JobFailed: this worker does not have the base.
        """
        if name not in self._bases:
            raise JobFailed(
                f"base {name!r} is not configured on this worker; add it to its ERRATA_BASES",
                code="base_not_loaded",
            )
        if name not in self._views:
            base = self._bases[name]
            model = load_model(base, self._dtype, self._device)
            view = ModelView(model, load_tokenizer(base), base)
            self._views[name] = (view, weights_digest(model))
        return self._views[name][0]

    def check_untouched(self, name: str) -> None:
        """Raises JobFailed if the base's weights in memory are not as they were loaded."""
        view, digest = self._views[name]
        if weights_digest(view.model) != digest:
            raise JobFailed(
                f"base {name!r}: its weights changed during the job; the result was thrown away",
                code="base_changed",
            )
