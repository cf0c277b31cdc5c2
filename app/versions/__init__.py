"""Versions: what they are made of, where they come from, what was measured of them."""
