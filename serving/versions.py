"""Resident versions: composed effects, loaded on first use, counted while requests hold them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from transformers import PreTrainedModel

from editing.deltas import Delta, Effect, compose
from registry.artifacts import ArtifactStore
from registry.bases import Base
from registry.errors import ErrataError, VersionUnavailable
from registry.manifests import VersionManifest
from serving.effects import check_effects, padded
from serving.protocol import ResidentVersion, VersionRef

#: Bytes of effects that stay in memory while no request uses them.
RESIDENT_BYTES = 2 * 2**30

Effects = Mapping[str, Effect]


@dataclass(eq=False)
class _Resident:
    effects: Effects
    base: str
    depth: int
    nbytes: int
    requests: int = 0


class Versions:
    """Versions by stack digest. Lives on the event loop; files are read in a thread of its own."""

    def __init__(self, store: ArtifactStore, resident_bytes: int = RESIDENT_BYTES) -> None:
        self._store = store
        self._limit = resident_bytes
        self._resident: dict[str, _Resident] = {}  # least recently used first
        self._loading: dict[str, asyncio.Future[_Resident]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="versions")

    async def acquire(self, ref: VersionRef, base: Base, model: PreTrainedModel) -> Effects:
        """The composed effects of a version; ``release`` gives them back.

        Raises:
            VersionUnavailable: a delta is missing, damaged or not for this base.
        """
        digest = ref.stack_digest
        if VersionManifest(base.ref, ref.stack).stack_digest != digest:
            raise VersionUnavailable(
                f"version {ref.id}: it was made on another base than the {base.name!r} that is"
                f" loaded (digest {base.digest}); serve the base that it names"
            )
        while (resident := self._resident.get(digest)) is None:
            if (load := self._loading.get(digest)) is None:
                load = asyncio.ensure_future(self._load(ref, base, model))
                self._loading[digest] = load
            await asyncio.shield(load)
        resident.requests += 1
        self._resident[digest] = self._resident.pop(digest)
        self._evict()
        return resident.effects

    def release(self, digest: str) -> None:
        """One request less holds this version."""
        self._resident[digest].requests -= 1
        self._evict()

    def listed(self) -> tuple[ResidentVersion, ...]:
        return tuple(
            ResidentVersion(digest, version.base, version.depth, version.nbytes, version.requests)
            for digest, version in self._resident.items()
        )

    async def _load(self, ref: VersionRef, base: Base, model: PreTrainedModel) -> _Resident:
        try:
            loop = asyncio.get_running_loop()
            effects = await loop.run_in_executor(self._thread, self._read, ref, base, model)
        finally:
            del self._loading[ref.stack_digest]
        nbytes = sum(effect.nbytes for effect in effects.values())
        resident = _Resident(effects, base.name, len(ref.stack), nbytes)
        self._resident[ref.stack_digest] = resident
        return resident

    def _read(self, ref: VersionRef, base: Base, model: PreTrainedModel) -> Effects:
        stack: list[Effects] = []
        for digest in ref.stack:
            try:
                delta = Delta.from_bytes(self._store.get(digest))
                if delta.base_digest != base.digest:
                    raise ValueError(f"it is for a base with digest {delta.base_digest}")
                check_effects(model, delta.effects)
            except (ErrataError, ValueError, OSError) as error:
                raise VersionUnavailable(
                    f"version {ref.id}: delta {digest} cannot be used: {error}"
                ) from error
            stack.append(delta.effects)
        return {path: padded(effect) for path, effect in compose(stack).items()}

    def _evict(self) -> None:
        held = sum(version.nbytes for version in self._resident.values())
        for digest, version in list(self._resident.items()):
            if held <= self._limit:
                return
            if not version.requests:
                del self._resident[digest]
                held -= version.nbytes
