"""What this process counts itself."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

disable_created_metrics()  # type: ignore[no-untyped-call]
REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Meters:
    """The counters and histograms of one process.

    Their labels have few values whatever users send: routes as they were declared, known methods,
    statuses, error codes, bases. None names a tenant, a key, an endpoint or a version.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "errata_http_requests",
            "Requests that were answered.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "errata_http_request_seconds",
            "Seconds from a request to the end of its answer.",
            ("method", "route"),
            registry=self.registry,
            buckets=REQUEST_SECONDS,
        )
        self.running = Gauge(
            "errata_http_requests_running",
            "Requests that are being answered.",
            registry=self.registry,
        )
        self.refused = Counter(
            "errata_rate_limited_requests",
            "Requests that were answered with 429, by the error's code.",
            ("code",),
            registry=self.registry,
        )
        self.first_token_seconds = Histogram(
            "errata_first_token_seconds",
            "Seconds from a completion's request to its first token.",
            ("base",),
            registry=self.registry,
            buckets=TOKEN_SECONDS,
        )
        self.inter_token_seconds = Histogram(
            "errata_inter_token_seconds",
            "Seconds between two tokens of a completion.",
            ("base",),
            registry=self.registry,
            buckets=TOKEN_SECONDS,
        )
