"""Datasets: what others publish and users hand in, read into the forms that travel. No torch."""

from editing.datasets.edits import read_edits
from editing.datasets.files import ARCHIVE, PURPOSES, read_examples, read_file

__all__ = ["ARCHIVE", "PURPOSES", "read_edits", "read_examples", "read_file"]
