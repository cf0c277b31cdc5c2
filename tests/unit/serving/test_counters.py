from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.counters import Histogram


@given(st.lists(st.floats(0, 10)))
def test_every_value_is_in_one_bucket(values: list[float]) -> None:
    found = Histogram((1.0, 2.5, 5.0))
    for value in values:
        found.observe(value)
    assert found.count == len(values)
    assert found.total == pytest.approx(sum(values))  # which newer Pythons add more exactly
    expected = [(f"{b:g}", sum(v <= b for v in values)) for b in (1.0, 2.5, 5.0)]
    assert found.cumulative() == [*expected, ("+Inf", len(values))]
    assert Histogram.from_json(asdict(found)) == found
