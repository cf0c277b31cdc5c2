"""Metrics in Prometheus' text format: counted here, asked of the engine, counted in SQL."""
