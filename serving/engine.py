"""The engine: lanes stepped by one thread, fed through an inbox."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from queue import Empty, SimpleQueue

from serving.lane import Lane, Output
from serving.stream import Stream

logger = logging.getLogger(__name__)


class Engine:
    """Steps lanes in turn while they have work.

    Args:
        lanes: the bases it serves.
        deliver: gets the outputs of each round, in the step thread.
    """

    def __init__(self, lanes: Sequence[Lane], deliver: Callable[[list[Output]], None]) -> None:
        self.lanes = {lane.base.name: lane for lane in lanes}
        self.steps = 0
        self._deliver = deliver
        self._inbox: SimpleQueue[Callable[[], list[Output]] | None] = SimpleQueue()

    def submit(self, lane: Lane, stream: Stream) -> None:
        """Queue a stream; safe from any thread, as are ``cancel`` and ``stop``."""
        self._inbox.put(partial(lane.add, stream))

    def cancel(self, lane: Lane, key: Hashable) -> None:
        self._inbox.put(partial(lane.cancel, key))

    def stop(self) -> None:
        """Let ``run`` return after the step it is in."""
        self._inbox.put(None)

    def run(self) -> None:
        """The step thread: until ``stop``.

        Raises:
            AcceleratorError: the device is lost to this process; another may have it.
        """
        while True:
            outputs: list[Output] = []
            if not self._take_orders(outputs):
                return
            for lane in self.lanes.values():
                if len(lane):
                    outputs += self._step(lane)
            if outputs:
                self._deliver(outputs)

    def _take_orders(self, outputs: list[Output]) -> bool:
        """Carry out what is in the inbox, waiting while there is nothing to step."""
        wait = not any(len(lane) for lane in self.lanes.values())
        while True:
            try:
                order = self._inbox.get(block=wait)
            except Empty:
                return True
            if order is None:
                return False
            outputs += order()
            wait = False

    def _step(self, lane: Lane) -> list[Output]:
        self.steps += 1
        try:
            return lane.step()
        except Exception as error:
            logger.exception("base %s: the engine failed in a step", lane.base.name)
            return lane.fail(error)
