"""What a dead worker or a dead Redis left on the queue: noticed, and put right."""

from __future__ import annotations

import logging
import time
from typing import Any

import redis

from workers.delivery import (
    HANDED_OVER,
    STARTED,
    JobRefused,
    attempt_of,
    forget,
    put_back,
    take_lost,
)

log = logging.getLogger(__name__)


class Recovery:
    """Sweeps the queue's lists. Every worker has one; each finding is taken by one worker only.

    Args:
        connection: the queue's Redis.
        patience: seconds that an attempt may stand between the queue and its worker.
    """

    def __init__(self, connection: redis.Redis, patience: float) -> None:
        self._connection = connection
        self._patience = patience
        self._seen: dict[Any, float] = {}

    def sweep(self) -> list[tuple[str, int]]:
        """Puts back what was taken but not started; removes executions whose heartbeat ended.

        Returns:
            The attempts, as (job id, attempt), whose worker has died.
        """
        self._put_back_stuck()
        return self._take_lost()

    def _put_back_stuck(self) -> None:
        """An attempt that a worker took off the queue and then died, or Redis did, in the act."""
        found: Any = self._connection.lrange(HANDED_OVER, 0, -1)
        now = time.monotonic()
        self._seen = {raw: self._seen.get(raw, now) for raw in found}
        for raw, since in self._seen.items():
            if now - since < self._patience:
                continue
            try:
                identifier = raw.decode("ascii")
                attempt_of(identifier)
            except (UnicodeDecodeError, JobRefused) as error:
                log.error("%s: %r is no attempt's id and is removed: %s", HANDED_OVER, raw, error)
                self._connection.lrem(HANDED_OVER, 0, raw)
                continue
            if put_back(self._connection, identifier):
                log.warning("attempt %s was taken but never started: queued again", identifier)

    def _take_lost(self) -> list[tuple[str, int]]:
        lost = []
        for raw in take_lost(self._connection):
            try:
                identifier, _, execution = raw.decode("ascii").partition(":")
                attempt = attempt_of(identifier)
            except (UnicodeDecodeError, JobRefused) as error:
                log.error("registry %s: %r is malformed and is removed: %s", STARTED, raw, error)
                continue
            forget(self._connection, identifier, execution)
            lost.append(attempt)
        return lost
