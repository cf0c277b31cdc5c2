"""The ground everything stands on: errors, settings, manifests, SQL and artifacts. No torch."""

__version__ = "0.1.0"
