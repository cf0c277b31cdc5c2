"""Endpoints: the names users query, moved by compare-and-swap and rolled back."""
