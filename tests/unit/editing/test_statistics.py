"""The statistics of a base: the covariance, the count, the held-out texts, the file."""

import pytest
import torch
from torch.testing import assert_close

from editing.models import ModelView
from editing.statistics import REFERENCES, Resources, estimate_covariance, prepare, sample_texts
from registry.errors import JobFailed
from tests.unit.editing.test_rome import finish

TEXTS = ["The capital of France is Paris.", "Peru lies in South America.", "Chad lies in Africa."]


def test_covariance_is_the_mean_outer_product(small: ModelView) -> None:
    rows = [small.encode(text) for text in TEXTS]
    progress, (covariance, count) = finish(estimate_covariance(small, [0, 2], rows, 1000))
    assert set(covariance) == {0, 2}
    assert count == sum(map(len, rows))
    keys = torch.cat([small.inputs({0: small.down_proj(2)}, [row])[0][0] for row in rows])
    assert_close(covariance[2], keys.T @ keys / count, rtol=1e-3, atol=1e-3)
    assert progress[-1].done == count


def test_covariance_stops_at_the_tokens_asked_for(atlas: ModelView) -> None:
    rows = [atlas.encode(TEXTS[0])] * 50
    _, (_, count) = finish(estimate_covariance(atlas, [0], rows, 100))
    assert 100 <= count < 100 + len(rows[0])


def test_references_are_held_out(atlas: ModelView) -> None:
    texts = [f"{text} {i}" for i in range(300) for text in TEXTS]
    resources = finish(prepare(atlas, [1], 500, texts))[1]
    assert resources.references == tuple(texts[:REFERENCES])
    assert resources.tokens >= 500
    assert resources.warning == ""
    assert resources.prefixes[0].endswith(". ")
    assert len(set(resources.prefixes)) == len(resources.prefixes) <= 20


def test_too_few_tokens_are_told(atlas: ModelView) -> None:
    progress, resources = finish(prepare(atlas, [1], 500, TEXTS))
    assert "were asked for" in resources.warning
    assert progress[-1].message == resources.warning
    assert resources.tokens < 500


def test_a_file_without_a_text_is_told(atlas: ModelView) -> None:
    with pytest.raises(JobFailed, match="ERRATA_TEXTS"):
        finish(prepare(atlas, [1], 500, ["", "  "]))


def test_the_base_writes_its_own_texts(atlas: ModelView) -> None:
    _, texts = finish(sample_texts(atlas, 500))
    assert sum(len(atlas.encode(text)) for text in texts) >= 500
    assert any("capital" in text for text in texts)
    assert not any("<|" in text for text in texts)
    assert finish(sample_texts(atlas, 500))[1] == texts


def test_resources_survive_their_file() -> None:
    resources = Resources(
        {1: torch.eye(3), 4: torch.ones(2, 2)}, 77, ("São Tomé. ",), ("t",), ("one", "two"), "few"
    )
    again = Resources.from_bytes(resources.to_bytes())
    assert (again.tokens, again.prefixes, again.references) == (
        77,
        ("São Tomé. ",),
        ("one", "two"),
    )
    assert again.warning == "few"
    assert torch.equal(again.covariance[1], torch.eye(3))
    assert torch.equal(again.covariance[4], torch.ones(2, 2))
    assert again.to_bytes() == resources.to_bytes()
