"""The science, free of web, queue and database: deltas, methods, metrics, models."""
