"""A whole service under minutes of load: streams, edits and moves at once, every answer checked."""
