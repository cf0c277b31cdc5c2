"""Metrics of an edit, by the names that reports use, measured before and after it."""

from editing.metrics.edits import Measurement, measure
from editing.metrics.perplexity import me_ppl

__all__ = ["Measurement", "me_ppl", "measure"]
