"""How many attacks a run tried, in its last lines."""

from __future__ import annotations

import pytest

from tests.security.attacks import tried


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if tried:
        terminalreporter.write_line(f"attack cases: {sum(tried.values())} ({tried})")
