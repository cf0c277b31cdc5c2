"""Benchmarks: what the README states, measured; `errata bench` runs them."""
