"""Jobs of every kind: list, follow, cancel."""
