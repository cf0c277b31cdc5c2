"""Datasets: edits in the forms that others publish, read into requests."""

from editing.datasets.edits import read_edits

__all__ = ["read_edits"]
