"""Traces by OpenTelemetry: off unless ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or its like) is set.

Spans are made through OpenTelemetry's API, which does nothing until a provider is set. A trace that
a request began goes on in the attempts at the job that it posted.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind, StatusCode

from telemetry.context import bound

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

_tracer = trace.get_tracer("errata")
#: Seconds that a process which ends waits for its last spans to be taken.
FLUSH_SECONDS = 3.0
_EXPORTER = "opentelemetry.exporter.otlp.proto.http"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def wanted() -> bool:
    """Whether the environment asks for traces."""
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "otlp").lower()
    named = any(os.environ.get(name) for name in _ENDPOINTS)
    return named and exporter == "otlp" and not disabled


def problem() -> str | None:
    """Why the traces that the environment asks for cannot be made, and the cure."""
    if not wanted():
        return None
    if find_spec("opentelemetry.exporter") is None or find_spec(_EXPORTER) is None:
        return (
            f"{_ENDPOINTS[0]} asks for traces, whose exporter is not installed:"
            ' `pip install ".[traces]"` in the checkout brings it'
        )
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    if protocol != "http/protobuf":
        return f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}; traces are sent as http/protobuf"
    return None


def configure(part: str) -> None:
    """Export this process's spans by OTLP over HTTP, if the environment asks for it.

    Args:
        part: which of the service's processes this is.
    """
    if not wanted() or problem() is not None:
        return
    exporter = import_module(f"{_EXPORTER}.trace_exporter")
    export = import_module("opentelemetry.sdk.trace.export")
    provide(part, [export.BatchSpanProcessor(exporter.OTLPSpanExporter())])


def provide(part: str, processors: Sequence[SpanProcessor]) -> None:
    """Give this process's spans to the processors; once in its life."""
    sdk: Any = import_module("opentelemetry.sdk.trace")
    resources: Any = import_module("opentelemetry.sdk.resources")
    attributes: dict[str, str | int] = {"errata.part": part, "process.pid": os.getpid()}
    if not os.environ.get("OTEL_SERVICE_NAME"):
        attributes["service.name"] = "errata"
    resource = resources.Resource.create(attributes)
    provider = sdk.TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(_discreet())
    for processor in processors:
        provider.add_span_processor(processor)
    trace.set_tracer_provider(provider)


def _discreet() -> SpanProcessor:
    """Takes what a user asks for out of the spans of requests: a query may hold a subject."""
    sdk: Any = import_module("opentelemetry.sdk.trace")

    class Discreet(sdk.SpanProcessor):  # type: ignore[misc]
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            for name in ("url.query", "url.path"):
                if name in (span.attributes or {}):
                    span.set_attribute(name, "-")

    processor: SpanProcessor = Discreet()
    return processor


def flush() -> None:
    """Send what has ended so far, within ``FLUSH_SECONDS``; the library itself knows no limit."""
    provider: Any = trace.get_tracer_provider()
    if hasattr(provider, "force_flush"):
        sending = threading.Thread(target=provider.force_flush, name="spans", daemon=True)
        sending.start()
        sending.join(FLUSH_SECONDS)


@contextmanager
def span(name: str, **attributes: str | int | float) -> Iterator[Span]:
    """A part of the work. What it raises marks it as failed, by its kind alone."""
    with _tracer.start_as_current_span(
        name, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as current:
        try:
            yield current
        except BaseException as error:
            current.set_attribute("error.type", type(error).__qualname__)
            current.set_status(StatusCode.ERROR)
            raise


@contextmanager
def detached(name: str, **attributes: str | int | float) -> Iterator[Span]:
    """As ``span``, for generators: it is not the current one, for others run in between."""
    made = _tracer.start_span(name, attributes=attributes)
    try:
        yield made
    except Exception as error:
        made.set_attribute("error.type", type(error).__qualname__)
        made.set_status(StatusCode.ERROR)
        raise
    finally:
        made.end()


def carrier(fields: Mapping[str, Any]) -> dict[str, str]:
    """What goes on with work that is done elsewhere; empty where nothing is known.

    Args:
        fields: what ``telemetry.context.fields`` gives.
    """
    carried: dict[str, str] = {}
    propagate.inject(carried)
    if "request_id" in fields:
        carried["request_id"] = str(fields["request_id"])
    return carried


@contextmanager
def continued(
    carried: Mapping[str, str],
    name: str,
    *,
    begun: float,
    attributes: Mapping[str, str | int | float],
) -> Iterator[Span]:
    """Work that another process asked for, as a part of its trace.

    Args:
        carried: what ``carrier`` gave there.
        begun: when it began, in Unix seconds.
    """
    parent = propagate.extract(dict(carried))
    started = _tracer.start_span(
        name,
        parent,
        kind=SpanKind.CONSUMER,
        attributes=attributes,
        start_time=_nanoseconds(begun),
    )
    with (
        bound(request_id=carried.get("request_id")),
        trace.use_span(
            started, end_on_exit=True, record_exception=False, set_status_on_exception=False
        ),
    ):
        yield started


def record(name: str, begun: float, ended: float, parent: Span | None = None) -> None:
    """A part that is over already.

    Args:
        begun, ended: in Unix seconds.
        parent: the span it belongs to; by default the current one.
    """
    within = None if parent is None else trace.set_span_in_context(parent)
    part = _tracer.start_span(name, within, start_time=_nanoseconds(begun))
    part.end(_nanoseconds(ended))


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
