"""The ground everything stands on: errors, settings, manifests, SQL and artifacts. No torch."""
