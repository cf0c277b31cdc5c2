"""How options are read."""

from __future__ import annotations


def names(given: list[str] | None) -> list[str]:
    """What an option names that takes names by commas and may be given more than once."""
    return [name.strip() for text in given or [] for name in text.split(",") if name.strip()]
