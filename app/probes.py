"""Asking the parts of the service whether they work, without ever waiting long for one."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar, cast

#: Seconds that a part may take to answer.
PROBE_SECONDS = 2.0

logger = logging.getLogger("errata.probes")
T = TypeVar("T")


class Probe(Generic[T]):
    """A question that blocks, asked in a thread of its own.

    While one thread hangs on it no second is begun, and nobody waits for it longer than
    ``PROBE_SECONDS``; nor does the process when it ends.

    Args:
        name: the part's, for its thread.
        ask: the question.
        keep: seconds that an answer is good for.
    """

    def __init__(self, name: str, ask: Callable[[], T], *, keep: float = 0.0) -> None:
        self._name = name
        self._ask = ask
        self._keep = keep
        self._answered_at = 0.0
        self._asking: asyncio.Future[T] | None = None

    async def answer(self) -> T:
        """What the part answers.

        Raises:
            TimeoutError: it does not, in time. And what the question raises.
        """
        if self._asking is None or (self._asking.done() and not self._is_fresh):
            self._asking = self._begin()
        return await asyncio.wait_for(asyncio.shield(self._asking), PROBE_SECONDS)

    @property
    def _is_fresh(self) -> bool:
        return time.monotonic() - self._answered_at < self._keep

    def _begin(self) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        future.add_done_callback(lambda done: done.cancelled() or done.exception())

        def end(result: T | None, error: Exception | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                self._answered_at = time.monotonic()
                future.set_result(cast(T, result))

        def run() -> None:
            result, failure = None, None
            try:
                result = self._ask()
            except Exception as error:
                failure = error
            try:
                loop.call_soon_threadsafe(end, result, failure)
            except RuntimeError:
                logger.debug("%s answers when nobody waits any more", self._name)

        threading.Thread(target=run, name=f"probe-{self._name}", daemon=True).start()
        return future
