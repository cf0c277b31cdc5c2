"""Tests. Their helpers' asserts are rewritten as their own are, so that they hold under -O too."""

import pytest

pytest.register_assert_rewrite(
    *(f"tests.{name}" for name in ("models", "security", "service", "unit"))
)
