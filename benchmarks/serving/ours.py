"""The engine as the service builds it, driven from one thread without the service around it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from editing.deltas import Delta, Effect
from registry.artifacts import ArtifactStore
from registry.bases import Base
from registry.manifests import VersionManifest
from registry.settings import Settings
from serving import scheduler
from serving.lane import Lane
from serving.loading import load_lane
from serving.protocol import SamplingParams, VersionRef
from serving.sampling import Sampler
from serving.stream import Stream
from serving.versions import Effects, Versions


@dataclass(frozen=True)
class Loaded:
    """A version that is resident in the engine."""

    ref: VersionRef
    effects: Effects


class Ours:
    """A lane and its versions.

    Args:
        base: what it serves.
        store: a folder of its own for deltas.
        settings: of the service, where they differ from the defaults.
        invariant: whether a request's bits may not depend on the batch.
    """

    def __init__(
        self, base: Base, store: Path, *, invariant: bool = False, **settings: Any
    ) -> None:
        self.base = base
        chosen = Settings.apart(store, batch_invariant=invariant, **settings)
        self.lane: Lane = load_lane(base, chosen)
        self.versions = Versions(ArtifactStore(store))
        self._store = ArtifactStore(store)
        self._tenants = count()
        self._base = self.load()

    @property
    def model(self) -> PreTrainedModel:
        return self.lane.runner.model

    def load(self, *stack: Mapping[str, Effect]) -> Loaded:
        """Write a stack of deltas and make the version resident; the base without any."""
        digests = tuple(
            self._store.put(Delta(effects, self.base.digest, "bench").to_bytes())
            for effects in stack
        )
        ref = VersionRef.of(VersionManifest(self.base.ref, digests))
        return Loaded(ref, asyncio.run(self.versions.acquire(ref, self.base, self.model)))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        versions: Sequence[Loaded] = (),
    ) -> list[list[int]]:
        """Greedy tokens, and their text as the service makes it, for all prompts at once.

        Args:
            prompts: the requests' token ids.
            new_tokens: of each request.
            versions: one a request, taken by turns; none: the base.
        """
        chosen = versions or (self._base,)
        streams = [
            self._stream(number, prompt, new_tokens, chosen[number % len(chosen)], Stream)
            for number, prompt in enumerate(prompts)
        ]
        return self._run(streams)

    def first_tokens(self, prompts: Sequence[Sequence[int]]) -> list[float]:
        """Seconds until each prompt's first token, all prompts sent at once."""
        streams = [
            self._stream(number, prompt, 1, self._base, Stream)
            for number, prompt in enumerate(prompts)
        ]
        started = time.perf_counter()
        for stream in streams:
            self.lane.add(stream)
        seconds: list[float] = []
        while len(self.lane):
            outputs = self.lane.step()
            seconds += [time.perf_counter() - started] * len(outputs)
        return seconds

    def logits(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[Tensor]]:
        """The logits [vocabulary] that each greedy token of each request came from."""
        streams = [
            self._stream(number, prompt, new_tokens, self._base, _Recorded)
            for number, prompt in enumerate(prompts)
        ]
        self._run(streams)
        return [stream.rows for stream in streams if isinstance(stream, _Recorded)]

    def _stream(
        self,
        key: int,
        prompt: Sequence[int],
        new_tokens: int,
        version: Loaded,
        kind: type[Stream],
    ) -> Stream:
        digest = version.ref.stack_digest
        # a tenant of its own: what an earlier run or request left in the prefix cache is of no use
        sequence = scheduler.Sequence(
            key, (digest,), tuple(prompt), new_tokens, tenant=str(next(self._tenants))
        )
        params = SamplingParams(temperature=0, ignore_eos=True)
        return kind(sequence, params, (version.effects,), self.lane.decoder, self.lane.eos)

    def _run(self, streams: Sequence[Stream]) -> list[list[int]]:
        outputs = [output for stream in streams for output in self.lane.add(stream)]
        while len(self.lane):
            outputs += self.lane.step()
        tokens: list[list[int]] = [[] for _ in streams]
        for output in outputs:
            if output.error is not None:
                raise output.error
            if output.piece is not None and isinstance(output.key, int):
                tokens[output.key].extend(output.piece.tokens)
        return tokens


class _Recorded(Stream):
    """A stream that keeps the logits its tokens are chosen by."""

    def __init__(self, sequence: scheduler.Sequence, params: SamplingParams, *rest: Any) -> None:
        super().__init__(sequence, params, *rest)
        self.rows: list[Tensor] = []
        self.sampler = _Recorder(params, self.rows)


class _Recorder(Sampler):
    def __init__(self, params: SamplingParams, rows: list[Tensor]) -> None:
        super().__init__(params)
        self.shapes = True
        self._rows = rows

    def shape(self, row: Tensor) -> None:
        self._rows.append(row.clone())
