"""Evaluations: what is measured of a version that is there already, as jobs."""
