"""Resident versions: composed effects, loaded on first use, counted while requests hold them.

Three tiers: the device's memory, which steps read; host memory, where versions that left a device
are found again; the artifact store. On a CPU the first is host memory, and there is no second.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from editing.deltas import Effect, compose
from editing.deltas.fit import read_fitting
from registry import failpoints
from registry.artifacts import ArtifactStore
from registry.bases import Base
from registry.errors import ErrataError, VersionUnavailable
from registry.manifests import VersionManifest
from serving.counters import LOAD_SECONDS, Histogram
from serving.protocol import VersionRef
from serving.status import ResidentVersion

#: Bytes of effects that a device holds.
RESIDENT_BYTES = 2 * 2**30

Effects = Mapping[str, Effect]


@dataclass(eq=False)
class _Resident:
    effects: Effects
    base: str
    depth: int
    nbytes: int
    requests: int = 0


@dataclass(eq=False)
class _Load:
    """A version on its way in, and how many requests wait for it."""

    task: asyncio.Task[_Resident]
    requests: int = 0


class Versions:
    """Versions by stack digest. Lives on the event loop; files are read in a thread of its own.

    Versions come in one at a time, first come first served. What no request holds leaves, least
    recently used first, when another version needs its room; when that is not enough, the other
    waits until requests end.

    Args:
        store: where the deltas are.
        resident_bytes: most bytes of effects in the device's memory, held by requests or not.
        host_bytes: most bytes kept in host memory for devices that have memory of their own.
    """

    def __init__(
        self, store: ArtifactStore, resident_bytes: int = RESIDENT_BYTES, host_bytes: int = 0
    ) -> None:
        self._store = store
        self._limit = resident_bytes
        self._host = _HostTier(host_bytes)
        self._resident: dict[str, _Resident] = {}  # least recently used first
        self._loads: dict[str, _Load] = {}
        self.loads = Histogram(LOAD_SECONDS)
        self.failed_loads = 0
        self._turn = asyncio.Lock()
        self._released = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="versions")

    async def acquire(self, ref: VersionRef, base: Base, model: PreTrainedModel) -> Effects:
        """The composed effects of a version on the model's device; ``release`` gives them back.

        Raises:
            VersionUnavailable: a delta is missing, damaged or not for this base, or the version is
                larger than all the room there is.
        """
        digest = ref.stack_digest
        if VersionManifest(base.ref, ref.stack).stack_digest != digest:
            raise VersionUnavailable(
                f"version {ref.id}: it was made on another base than the {base.name!r} that is"
                f" loaded (digest {base.digest}); serve the base that it names"
            )
        if not ref.stack and digest not in self._resident:
            self._resident[digest] = _Resident({}, base.name, 0, 0)
        if (resident := self._resident.get(digest)) is not None:
            resident.requests += 1
            self._resident[digest] = self._resident.pop(digest)
            self._host.touch(digest)
            return resident.effects
        if (load := self._loads.get(digest)) is None:
            load = _Load(asyncio.create_task(self._timed(self._load(ref, base, model))))
            self._loads[digest] = load
            load.task.add_done_callback(lambda _: self._forget(digest, load))
        return await self._loaded(digest, load)

    async def warm(self, ref: VersionRef, base: Base, model: PreTrainedModel) -> None:
        """Load a version that requests will soon ask for; raises as ``acquire`` does."""
        await self.acquire(ref, base, model)
        self.release(ref.stack_digest)

    def release(self, digest: str) -> None:
        """One request less holds this version."""
        self._resident[digest].requests -= 1
        self._released.set()

    def listed(self) -> tuple[ResidentVersion, ...]:
        return tuple(
            ResidentVersion(digest, version.base, version.depth, version.nbytes, version.requests)
            for digest, version in self._resident.items()
        )

    async def _loaded(self, digest: str, load: _Load) -> Effects:
        """Wait for a version; once it is there, it is held for everybody who waited."""
        load.requests += 1
        try:
            return (await asyncio.shield(load.task)).effects
        except asyncio.CancelledError:
            if load.task.done() and not load.task.cancelled() and not load.task.exception():
                self.release(digest)
            else:
                load.requests -= 1
                if not load.requests:
                    load.task.cancel()
                    self._forget(digest, load)
            raise

    def _forget(self, digest: str, load: _Load) -> None:
        if self._loads.get(digest) is load:
            del self._loads[digest]

    async def _timed(self, loading: Coroutine[None, None, _Resident]) -> _Resident:
        begun = time.monotonic()
        try:
            resident = await loading
        except Exception:
            self.failed_loads += 1
            raise
        self.loads.observe(time.monotonic() - begun)
        return resident

    async def _load(self, ref: VersionRef, base: Base, model: PreTrainedModel) -> _Resident:
        digest, loop = ref.stack_digest, asyncio.get_running_loop()
        async with self._turn:
            if (effects := self._host.get(digest)) is None:
                effects = await loop.run_in_executor(self._thread, self._read, ref, base, model)
            nbytes = _nbytes(effects)
            if nbytes > self._limit:
                raise VersionUnavailable(
                    f"version {ref.id}: its effects take {nbytes} bytes, more than the"
                    f" {self._limit} of ERRATA_RESIDENT_BYTES; raise it"
                )
            self._host.put(digest, effects, nbytes)
            while not self._make_room(nbytes):
                self._released.clear()
                await self._released.wait()
            effects = await loop.run_in_executor(self._thread, _moved, effects, model.device)
            held = self._loads[digest].requests
            resident = _Resident(effects, base.name, len(ref.stack), nbytes, held)
            self._resident[digest] = resident
            return resident

    def _read(self, ref: VersionRef, base: Base, model: PreTrainedModel) -> Effects:
        """A version's deltas, each read by digest and checked, as one effect a module."""
        failpoints.reach("loading")
        stack: list[Effects] = []
        for digest in ref.stack:
            try:
                delta = read_fitting(self._store.get(digest), model, base.digest)
            except (ErrataError, OSError) as error:
                raise VersionUnavailable(
                    f"version {ref.id}: delta {digest} cannot be used: {error}"
                ) from error
            stack.append(delta.effects)
        composed = compose(stack)
        for path, effect in composed.items():
            if not all(bool(torch.isfinite(part).all()) for part in effect.parts().values()):
                raise VersionUnavailable(
                    f"version {ref.id}: its deltas compose to numbers at {path!r} that are not"
                    " finite; take the largest out of the stack"
                )
        return composed

    def _make_room(self, nbytes: int) -> bool:
        """Let versions that nobody holds leave, until ``nbytes`` fit or none is left."""
        used = sum(version.nbytes for version in self._resident.values())
        for digest, version in list(self._resident.items()):
            if used + nbytes <= self._limit:
                break
            if not version.requests:
                del self._resident[digest]
                used -= version.nbytes
        return used + nbytes <= self._limit


class _HostTier:
    """The versions used last, in host memory."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: dict[str, tuple[Effects, int]] = {}  # least recently used first

    def get(self, digest: str) -> Effects | None:
        kept = self._kept.get(digest)
        return None if kept is None else kept[0]

    def touch(self, digest: str) -> None:
        if digest in self._kept:
            self._kept[digest] = self._kept.pop(digest)

    def put(self, digest: str, effects: Effects, nbytes: int) -> None:
        if nbytes > self._limit:
            return
        self._kept.pop(digest, None)
        self._kept[digest] = effects, nbytes
        while sum(size for _, size in self._kept.values()) > self._limit:
            del self._kept[next(iter(self._kept))]


def _nbytes(effects: Effects) -> int:
    return sum(effect.nbytes for effect in effects.values())


def _moved(effects: Effects, device: torch.device) -> Effects:
    """Copies on the device, each in memory of its own that holds nothing else."""
    return {
        path: effect.map(lambda part: part.detach().to(device, copy=True))
        for path, effect in effects.items()
    }
