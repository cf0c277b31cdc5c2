"""Metrics of an edit, by the names that reports use, measured before and after it."""

from editing.metrics.edits import Measurement, measure
from editing.metrics.perplexity import me_ppl
from editing.metrics.targets import greedy_matches

__all__ = ["Measurement", "greedy_matches", "me_ppl", "measure"]
