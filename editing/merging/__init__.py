"""Merging: versions of one base made into one delta, tensor by tensor; the catalogue has no torch.

To add a method: a frozen pydantic model in ``hyperparameters.py``, a function as in
``interface.py``, and an entry in ``catalogue.py``.
"""

from editing.merging.catalogue import MERGES, MergeEntry

__all__ = ["MERGES", "MergeEntry"]
