"""The catalogue of editing methods: names, hyperparameters and needs, without torch.

To add one: a frozen pydantic model in ``hyperparameters.py``, an ``apply`` as in ``interface.py``
in a file of its own, and an entry here.
"""

from editing.methods.catalogue import METHODS, MethodEntry

__all__ = ["METHODS", "MethodEntry"]
