"""``POST /v1/merges``: several versions made into one, taken as jobs."""
