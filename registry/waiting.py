"""Waiting, at start, for what the service stands on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from registry.errors import Unavailable
from registry.momentary import reason

logger = logging.getLogger("errata.start")
_TRY_SECONDS = 0.5
_TELL_SECONDS = 5.0


def wait_for(name: str, answers: Callable[[], None], seconds: float) -> None:
    """Until ``answers`` no longer raises Unavailable; what else it raises ends the waiting.

    Raises:
        Unavailable: it did for so many seconds.
    """
    started = told = time.monotonic()
    while True:
        try:
            return answers()
        except Unavailable as error:
            why, now = reason(error), time.monotonic()
            if now - started >= seconds:
                raise Unavailable(
                    f"{name} did not answer for {seconds:g} s: {why}; start it, or let"
                    " ERRATA_WAIT_SECONDS be longer"
                    if seconds
                    else f"{name} does not answer: {why}; start it, and try again"
                ) from error
            if told == started or now - told >= _TELL_SECONDS:
                logger.warning("waiting for %s: %s", name, why)
                told = now
        time.sleep(min(_TRY_SECONDS, seconds))
