"""Merging, measured on atlas: ``errata bench merging``."""
