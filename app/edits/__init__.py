"""``POST /v1/edits``: corrections, taken as jobs."""
