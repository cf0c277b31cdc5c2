"""Tests. Their helpers' asserts are rewritten as their own are, so that they hold under -O too."""

from pathlib import Path

import pytest

pytest.register_assert_rewrite(
    *(f"tests.{path.stem}" for path in Path(__file__).parent.iterdir() if path.stem != "conftest")
)
