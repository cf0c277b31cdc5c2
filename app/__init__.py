"""The HTTP face and the command line: one folder a feature. No torch."""
