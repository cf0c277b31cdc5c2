"""A whole service under minutes of load: many streams, edits and moves at once, each answer checked."""
