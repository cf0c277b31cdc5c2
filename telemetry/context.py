"""What the work at hand belongs to: a request, a job's attempt, a trace.

It is carried by the context of tasks and threads, and handed on in a job's row and with a request
to the engine.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

from opentelemetry import trace

#: What a request's id may be: shown in logs, kept in SQL, sent back.
_WELL_FORMED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
#: What an API key begins with: whoever sends one in the wrong header must not find it in a log.
_KEY = "er_"

Field = str | int
_bound: ContextVar[Mapping[str, Field]] = ContextVar("errata_context", default=MappingProxyType({}))


def request_id_of(given: str) -> str:
    """A client's own id of its request where that is well-formed, else a new one."""
    if _WELL_FORMED.fullmatch(given) and not given.startswith(_KEY):
        return given
    return f"req_{secrets.token_hex(12)}"


@contextmanager
def bound(**fields: Field | None) -> Iterator[None]:
    """Within it, and in what is started there, the work belongs to this too; None: not known."""
    known = {name: value for name, value in fields.items() if value is not None}
    token = _bound.set({**_bound.get(), **known})
    try:
        yield
    finally:
        _bound.reset(token)


def fields() -> dict[str, Field]:
    """All that is known: ``request_id``, ``job_id``, ``attempt``, ``trace_id``."""
    known = dict(_bound.get())
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        known["trace_id"] = trace.format_trace_id(span.trace_id)
    return known
