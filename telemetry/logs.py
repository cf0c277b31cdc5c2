"""Logs: one handler and one form for everything that a process says, its libraries included.

No log holds what users send or are sent, at any level: this project's own loggers name things by
their ids, libraries are heard from WARNING on (below it they log statements, rows and addresses),
and of an exception only the kinds whose messages speak of the machine keep their message.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from telemetry.context import fields

#: The loggers that ``ERRATA_LOG_LEVEL`` is for.
OWN = ("app", "benchmarks", "editing", "errata", "registry", "serving", "telemetry", "workers")
#: Errors of the machine: a file, a socket, memory. Others may quote a value.
_OF_THE_MACHINE = (OSError, ImportError, MemoryError, RuntimeError)
_OF_LIBRARIES = ("redis", "torch")
#: Attributes of a record that stand beside its message: what ``extra`` of a call may hold.
TOLD = ("method", "route", "status", "seconds")


def configure(form: str, level: str, terminal: logging.Handler | None = None) -> None:
    """Send all logs of this process to stderr.

    Args:
        form: ``text``, or ``json``: an object a line.
        level: the least that this project's own loggers say: ``DEBUG``, ``INFO``, ...
        terminal: what shows text, with times and levels of its own, where people watch.
    """
    handler: logging.Handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    if terminal is not None and form == "text":
        handler = terminal
        handler.setFormatter(TextFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in OWN:
        logging.getLogger(name).setLevel(level)
    logging.getLogger("rq.worker").setLevel(logging.CRITICAL)  # its errors are whole tracebacks
    logging.captureWarnings(True)
    sys.excepthook = _uncaught
    threading.excepthook = _uncaught_in_thread


class TextFormatter(logging.Formatter):
    """As people read it: time, level, logger, message, and in brackets what it belongs to."""

    def __init__(self, form: str = "%(asctime)s %(levelname)s %(name)s: %(message)s") -> None:
        super().__init__(form)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.message = message_of(record)
        belongs = " ".join(f"{name}={value}" for name, value in fields().items())
        text = super().formatMessage(record)
        return f"{text} [{belongs}]" if belongs else text

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return "".join(_trace(ei[1], set())).rstrip()


class JsonFormatter(TextFormatter):
    """An object a line: ``time`` (UTC), ``level``, ``logger``, ``message``, what it belongs to."""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        body: dict[str, Any] = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": message_of(record),
            **fields(),
        }
        body |= {name: getattr(record, name) for name in TOLD if hasattr(record, name)}
        if record.exc_info and record.exc_info[1] is not None:
            body["exception"] = self.formatException(record.exc_info)
        return json.dumps(body, default=str)


def message_of(record: logging.LogRecord) -> str:
    """A record's message; of asyncio's only the first line, for the others quote exceptions."""
    message = record.getMessage()
    return message.partition("\n")[0] if record.name == "asyncio" else message


def _trace(error: BaseException, seen: set[int]) -> Iterator[str]:
    """As the traceback module prints it, without the messages that may quote a value."""
    seen.add(id(error))
    before = error.__cause__
    if before is None and not error.__suppress_context__:
        before = error.__context__
    if before is not None and id(before) not in seen:
        yield from _trace(before, seen)
        yield "\n"
    yield "Traceback (most recent call last):\n"
    yield from traceback.format_tb(error.__traceback__)
    yield f"{describe(error)}\n"
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _trace(part, seen)


def describe(error: BaseException) -> str:
    """An exception's kind, and its message if that can only speak of the machine."""
    kind = type(error)
    name = kind.__qualname__
    if kind.__module__ != "builtins":
        name = f"{kind.__module__}.{name}"
    library = kind.__module__.partition(".")[0]
    if isinstance(error, _OF_THE_MACHINE) or library in _OF_LIBRARIES:
        return f"{name}: {error}"
    if kind.__name__ == "OperationalError":  # the driver's words on the database itself
        own = getattr(error, "orig", None) or error
        return f"{name}: {str(own).strip().partition(chr(10))[0]}"
    return name


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    logging.getLogger("errata").critical("the process ends", exc_info=(kind, error, trace))


def _uncaught_in_thread(arguments: threading.ExceptHookArgs) -> None:
    error = arguments.exc_value
    if error is not None:
        name = arguments.thread.name if arguments.thread else "?"
        logging.getLogger("errata").critical("the thread %s ends", name, exc_info=error)
