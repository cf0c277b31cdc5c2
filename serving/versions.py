"""Resident versions: composed effects, loaded on first use, counted while requests hold them.

Three tiers: the device's memory, which steps read; host memory, where versions that left a device
are found again; the artifact store. On a CPU the first is host memory, and there is no second.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

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
#: Longest time that a request waits for room.
ROOM_SECONDS = 10.0
#: Seconds after which a request that found no room may try again.
RETRY_SECONDS = 5
#: Versions that are read at a time: one whose store does not answer holds up no other.
READERS = 4

Effects = Mapping[str, Effect]


@dataclass(eq=False)
class _Resident:
    """A version that has its room on the device; its effects may be on their way there yet."""

    effects: asyncio.Future[Effects]
    base: str
    depth: int
    nbytes: int
    requests: int = 0

    @property
    def idle(self) -> bool:
        return not self.requests and self.effects.done()


@dataclass(eq=False)
class _Load:
    """A version that is read, and how many wait for it."""

    task: asyncio.Task[Effects]
    requests: int = 0


@dataclass(eq=False)
class _Claim:
    """A request for versions: it gets room for all of them at once, and none of it before.

    Attributes:
        sizes: bytes of each version, by digest.
        held: the versions in order, once there is room; each is held for the request then.
    """

    refs: tuple[VersionRef, ...]
    base: Base
    model: PreTrainedModel
    held: asyncio.Future[list[_Resident]]
    sizes: dict[str, int] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return ", ".join(f"version {ref.id}" for ref in self.refs)


class Versions:
    """Versions by stack digest. Lives on the event loop; files are read in threads of its own.

    What no request holds leaves, least recently used first, when others need its room. When even
    that is not enough, a request waits until others end, but not for long, and whoever fits passes
    it. What waits takes no memory meanwhile: it is read again once it has room.

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
        self._claims: list[_Claim] = []  # those that wait for room, first come first served
        self.loads = Histogram(LOAD_SECONDS)
        self.failed_loads = 0
        self._reading = ThreadPoolExecutor(READERS, thread_name_prefix="versions")
        self._moving = ThreadPoolExecutor(1, thread_name_prefix="moves")

    async def acquire(self, ref: VersionRef, base: Base, model: PreTrainedModel) -> Effects:
        """As ``acquire_all``, of one version."""
        (effects,) = await self.acquire_all([ref], base, model)
        return effects

    async def acquire_all(
        self, refs: Iterable[VersionRef], base: Base, model: PreTrainedModel
    ) -> tuple[Effects, ...]:
        """The composed effects of versions on the model's device, held together or not at all.

        ``release`` gives each of them back.

        Raises:
            VersionUnavailable: a delta is missing, damaged or not for this base, or there is no
                room: never, as all the room there is is too little, or not in ROOM_SECONDS.
        """
        loop = asyncio.get_running_loop()
        claim = _Claim(tuple(refs), base, model, loop.create_future())
        for ref in claim.refs:
            claim.sizes[ref.stack_digest] = await self._size(ref, claim)
        if (nbytes := sum(claim.sizes.values())) > self._limit:
            raise VersionUnavailable(
                f"{claim}: one request needs them together, and their effects take {nbytes} bytes,"
                f" more than the {self._limit} of ERRATA_RESIDENT_BYTES; raise it"
            )
        try:
            if not self._take(claim):
                self._claims.append(claim)
                await asyncio.wait([claim.held], timeout=ROOM_SECONDS)
            if not claim.held.done():
                self.failed_loads += 1
                raise VersionUnavailable(
                    f"{claim}: no room for {nbytes} bytes of effects in {ROOM_SECONDS:g} s, as"
                    f" requests hold what fills the {self._limit} of ERRATA_RESIDENT_BYTES; try"
                    " again later, or raise it",
                    retry_after=RETRY_SECONDS,
                )
            return tuple([await asyncio.shield(held.effects) for held in claim.held.result()])
        except BaseException:
            if claim.held.done():
                self._give_back(claim.held.result())
            else:
                self._claims.remove(claim)
            raise

    async def warm(self, ref: VersionRef, base: Base, model: PreTrainedModel) -> None:
        """Load a version that requests will soon ask for; raises as ``acquire`` does."""
        await self.acquire(ref, base, model)
        self.release(ref.stack_digest)

    def release(self, digest: str) -> None:
        """One request less holds this version."""
        self._give_back([self._resident[digest]])

    def loaded(self, refs: Iterable[VersionRef]) -> bool:
        """Whether a request for these would wait for nothing."""
        found = (self._resident.get(ref.stack_digest) for ref in refs if ref.stack)
        return all(resident is not None and resident.effects.done() for resident in found)

    def listed(self) -> tuple[ResidentVersion, ...]:
        return tuple(
            ResidentVersion(digest, version.base, version.depth, version.nbytes, version.requests)
            for digest, version in self._resident.items()
            if version.effects.done()
        )

    async def _size(self, ref: VersionRef, claim: _Claim) -> int:
        """Bytes of a version's effects. What must be read for that comes in if there is room."""
        digest = ref.stack_digest
        if VersionManifest(claim.base.ref, ref.stack).stack_digest != digest:
            raise VersionUnavailable(
                f"version {ref.id}: it was made on another base than the {claim.base.name!r} that"
                f" is loaded (digest {claim.base.digest}); serve the base that it names"
            )
        if not ref.stack and digest not in self._resident:
            nothing: asyncio.Future[Effects] = asyncio.get_running_loop().create_future()
            nothing.set_result({})
            self._resident[digest] = _Resident(nothing, claim.base.name, 0, 0)
        if (resident := self._resident.get(digest)) is not None:
            return resident.nbytes
        for other in self._claims:
            if digest in other.sizes:
                return other.sizes[digest]
        effects = await self._read_once(ref, claim)
        nbytes = _nbytes(effects)
        if digest not in self._resident and self._make_room(nbytes):
            self._enter(ref, claim, nbytes, effects)
        return nbytes

    async def _read_once(self, ref: VersionRef, claim: _Claim) -> Effects:
        """A version's effects in host memory, read once for everybody who waits for them."""
        digest = ref.stack_digest
        if (load := self._loads.get(digest)) is None:
            load = _Load(asyncio.create_task(self._found(ref, claim)))
            self._loads[digest] = load
            load.task.add_done_callback(lambda _: self._forget(digest, load))
        load.requests += 1
        try:
            return await asyncio.shield(load.task)
        finally:
            load.requests -= 1
            if not load.requests and not load.task.done():
                load.task.cancel()
                self._forget(digest, load)

    def _forget(self, digest: str, load: _Load) -> None:
        if self._loads.get(digest) is load:
            del self._loads[digest]

    async def _found(self, ref: VersionRef, claim: _Claim) -> Effects:
        digest, loop = ref.stack_digest, asyncio.get_running_loop()
        with self._counted():
            if (effects := self._host.get(digest)) is None:
                effects = await loop.run_in_executor(
                    self._reading, self._read, ref, claim.base, claim.model
                )
            if (nbytes := _nbytes(effects)) > self._limit:
                raise VersionUnavailable(
                    f"version {ref.id}: its effects take {nbytes} bytes, more than the"
                    f" {self._limit} of ERRATA_RESIDENT_BYTES; raise it"
                )
            self._host.put(digest, effects, nbytes)
            return effects

    @contextmanager
    def _counted(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self.failed_loads += 1
            raise

    def _take(self, claim: _Claim) -> bool:
        """Hold all that a request is for, if there is room."""
        missing = {
            ref.stack_digest: ref for ref in claim.refs if ref.stack_digest not in self._resident
        }
        if not self._make_room(sum(claim.sizes[digest] for digest in missing), claim.sizes):
            return False
        for digest, ref in missing.items():
            self._enter(ref, claim, claim.sizes[digest])
        claim.held.set_result([self._hold(ref.stack_digest) for ref in claim.refs])
        return True

    def _hold(self, digest: str) -> _Resident:
        resident = self._resident[digest] = self._resident.pop(digest)
        self._host.touch(digest)
        resident.requests += 1
        return resident

    def _give_back(self, held: Sequence[_Resident]) -> None:
        for resident in held:
            resident.requests -= 1
        if any(resident.idle for resident in held):
            self._grant()

    def _grant(self) -> None:
        """Give what room there is to those that wait for it, before anybody else can take it."""
        self._claims = [claim for claim in self._claims if not self._take(claim)]

    def _enter(
        self, ref: VersionRef, claim: _Claim, nbytes: int, effects: Effects | None = None
    ) -> None:
        """Give a version room, which there is, and have it come there."""
        digest = ref.stack_digest
        coming = asyncio.create_task(self._moved(ref, claim, effects))
        resident = _Resident(coming, claim.base.name, len(ref.stack), nbytes)
        self._resident[digest] = resident
        coming.add_done_callback(lambda _: self._arrived(digest, resident))

    async def _moved(self, ref: VersionRef, claim: _Claim, effects: Effects | None) -> Effects:
        if effects is None:
            effects = await self._read_once(ref, claim)
        with self._counted():
            moved = await asyncio.get_running_loop().run_in_executor(
                self._moving, _copied, effects, claim.model.device
            )
        self.loads.observe(time.monotonic() - claim.begun)
        return moved

    def _arrived(self, digest: str, resident: _Resident) -> None:
        """A version is where its room is, or failed on its way there."""
        failed = resident.effects.cancelled() or resident.effects.exception() is not None
        if failed and self._resident.get(digest) is resident:
            del self._resident[digest]
        self._grant()

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

    def _make_room(self, nbytes: int, kept: Container[str] = ()) -> bool:
        """Let others than ``kept`` that nobody holds leave for ``nbytes``; none if they are few."""
        free = self._limit - sum(version.nbytes for version in self._resident.values())
        leaving: list[str] = []
        for digest, version in self._resident.items():
            if free >= nbytes:
                break
            if version.idle and version.nbytes and digest not in kept:
                leaving.append(digest)
                free += version.nbytes
        if free < nbytes:
            return False
        for digest in leaving:
            del self._resident[digest]
        return True


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


def _copied(effects: Effects, device: torch.device) -> Effects:
    """Copies on the device, each in memory of its own that holds nothing else."""
    return {
        path: effect.map(lambda part: part.detach().to(device, copy=True))
        for path, effect in effects.items()
    }
