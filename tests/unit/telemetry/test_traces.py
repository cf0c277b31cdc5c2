"""Spans, in a process of their own: a provider is set once in a process's life."""

import json
import os
import socket
import subprocess
import sys

import pytest

from telemetry import traces

WORK = """
import json, time
from opentelemetry import trace
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from telemetry import traces
from telemetry.context import bound, fields

assert traces.carrier(fields()) == {}
kept = InMemorySpanExporter()
traces.provide("test", [SimpleSpanProcessor(kept)])
with bound(request_id="abc"), traces.span("request", **{"url.query": "subject=Peru"}):
    carried = traces.carrier(fields())
    trace_id = fields()["trace_id"]
assert carried["request_id"] == "abc" and trace_id in carried["traceparent"]
now = time.time()
try:
    with traces.continued(carried, "job edit", begun=now - 1, attributes={"errata.attempt": 1}):
        assert fields() == {"request_id": "abc", "trace_id": trace_id}
        traces.record("claim", now - 1, now)
        with traces.detached("generate") as apart:
            pass
        with traces.span("method"):
            raise ValueError("the prompt")
except ValueError:
    pass
spans = kept.get_finished_spans()
assert len({span.context.trace_id for span in spans}) == 1
print(json.dumps([json.loads(span.to_json()) for span in spans]))
"""


def test_work_goes_on_in_the_trace_that_asked_for_it() -> None:
    ended = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    spans = {span["name"]: span for span in json.loads(ended.stdout)}
    parents = {name: span["parent_id"] for name, span in spans.items()}
    ids = {name: span["context"]["span_id"] for name, span in spans.items()}
    assert parents["job edit"] == ids["request"]
    assert {parents[name] for name in ("claim", "generate", "method")} == {ids["job edit"]}
    assert spans["method"]["attributes"] == {"error.type": "ValueError"}
    assert spans["request"]["attributes"]["url.query"] == "-"
    assert "the prompt" not in ended.stdout
    assert spans["job edit"]["resource"]["attributes"]["errata.part"] == "test"


SILENT = """
import time
from telemetry import traces

traces.configure("test")
with traces.span("one"):
    pass
begun = time.monotonic()
traces.flush()
print(time.monotonic() - begun)
"""


def test_a_collector_that_does_not_answer_holds_no_process_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        ended = subprocess.run(
            [sys.executable, "-c", SILENT],
            env={**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": url},
            capture_output=True,
            text=True,
            timeout=60,
        )
        silent.settimeout(0)
        silent.accept()[0].close()  # it was asked
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) < traces.FLUSH_SECONDS + 5


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_traces_are_made_where_the_environment_asks_for_them(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], wanted: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert traces.wanted() is wanted


def test_a_protocol_that_is_not_spoken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://x")
    assert traces.problem() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    assert "http/protobuf" in (traces.problem() or "")
