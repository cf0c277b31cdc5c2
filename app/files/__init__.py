"""Files: edits, examples, texts, facts and suites, uploaded once and named by jobs."""
