"""What is told of completions: seconds to the first token, between tokens, and where they went."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from opentelemetry.trace import Span

from app.metrics.meters import Meters
from serving.protocol import Piece, Timing
from telemetry import traces


async def observed(
    meters: Meters, base: str, pieces: AsyncGenerator[tuple[int, Piece], None]
) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces, as they come; they are timed from the moment that the first is asked for."""
    first = meters.first_token_seconds.labels(base)
    between = meters.inter_token_seconds.labels(base)
    begun = time.monotonic()
    latest: dict[int, float] = {}  # when each completion's newest token came
    with traces.detached("generate", base=base) as span:
        async with aclosing(pieces):
            async for index, piece in pieces:
                if piece.tokens:
                    now = time.monotonic()
                    if index in latest:
                        between.observe(now - latest[index])
                    else:
                        first.observe(now - begun)
                    latest[index] = now
                if piece.timing is not None and span.is_recording():
                    _record(piece.timing, span)
                yield index, piece


def _record(timing: Timing, parent: Span) -> None:
    """The parts of a completion that ended just now, as spans."""
    ended = time.time()
    decoding = ended - timing.decode
    computing = decoding - timing.prefill
    traces.record("queue", computing - timing.queued, computing, parent)
    traces.record("prefill", computing, decoding, parent)
    traces.record("decode", decoding, ended, parent)
