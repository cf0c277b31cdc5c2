"""The kinds of job: a module each, whose ``perform(work)`` reads the request and makes a Result."""
