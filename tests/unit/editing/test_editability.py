"""Editability: the dimension of known distributions, the bound it gives, and refusals."""

import json

import pytest
import torch

from editing.atlas.evaluation import counterfacts
from editing.atlas.facts import read_facts
from editing.metrics.editability import editability, intrinsic_dimension
from editing.models import ModelView
from editing.models.sphere import sphere_of, token_features
from registry.errors import InvalidRequest
from tests.unit.editing.conftest import LAYERS, small_view
from tests.unit.editing.runs import TEXTS


def ball(count: int, dimension: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(dimension)
    x = torch.randn(count, dimension, generator=source)
    radii = torch.rand(count, 1, generator=source) ** (1 / dimension)
    return x / x.norm(dim=1, keepdim=True) * radii


@pytest.mark.parametrize("dimension", [1, 2, 4, 6])
def test_a_balls_dimension_is_its_own(dimension: int) -> None:
    found, at_least = intrinsic_dimension(ball(1500, dimension), 0.0)
    assert found == pytest.approx(dimension, abs=0.15)
    assert not at_least


def test_it_counts_pairs_of_different_points() -> None:
    x = ball(40, 3)
    near = [bool((x[i] - x[j]) @ x[j] >= -0.1) for i in range(40) for j in range(40) if i != j]
    expected = -1 - torch.tensor(sum(near) / len(near)).log2()
    assert intrinsic_dimension(x, -0.1)[0] == pytest.approx(float(expected), abs=1e-5)
    far = torch.eye(8)
    assert intrinsic_dimension(far, -0.1) == (pytest.approx(-1 + torch.tensor(56.0).log2()), True)


def test_the_bound_holds_on_atlas(atlas: ModelView) -> None:
    cases = counterfacts(read_facts(), 25, 5)
    prompts = [p for case in cases for p in (case.rewrite_prompt, *case.paraphrase_prompts[:3])]
    theta = 0.05
    found = editability(atlas, prompts, theta=theta)
    assert json.loads(json.dumps(found)) == found
    assert [row["layer"] for row in found["layers"]] == list(range(atlas.n_layers))
    different = list(dict.fromkeys(prompts))
    assert found["prompts"] == len(different)
    features = token_features(atlas, range(atlas.n_layers), different, last=True)
    for row in found["layers"]:
        z = features[row["layer"]]
        answering = (z @ z.T >= z.square().sum(1) - theta).fill_diagonal_(False)
        share = answering.sum() / (len(z) * (len(z) - 1))
        assert 0 < float(share) <= row["false_positive_bound"] < 1
        assert row["exposure"] == 1 - row["false_positive_bound"]
    low, *_, high = found["layers"]
    assert low["exposure"] < high["exposure"]
    best = max(found["layers"], key=lambda row: row["exposure"])
    assert found["best_layer"] == best["layer"]


def test_features_are_on_the_sphere(small: ModelView) -> None:
    """Whatever the family's norm: what it reads, standardised, has length 1."""
    z = token_features(small, [1], TEXTS)[1]
    assert torch.allclose(z.norm(dim=1), torch.ones(len(z)), atol=1e-3)
    last = token_features(small, [1], TEXTS, last=True)[1]
    assert last.shape == (len(TEXTS), small.hidden_size)
    w, b = sphere_of(small, 1).row(z[:2], torch.tensor([0.5, -2.0]))
    x = (z - sphere_of(small, 1).offset) / sphere_of(small, 1).weight
    assert torch.allclose(x @ w.T + b, z @ z[:2].T + torch.tensor([0.5, -2.0]), atol=1e-3)


@pytest.mark.parametrize(
    ("prompts", "layers", "param"),
    [
        (["Peru lies in"], None, "prompts"),
        (["Peru lies in"] * 3, None, "prompts"),
        (["Peru lies in", " "], None, "prompts.1"),
        (["Peru lies in", "Chad lies in"], [LAYERS], "hyperparameters.layer"),
    ],
)
def test_refusals(
    atlas: ModelView, prompts: list[str], layers: list[int] | None, param: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        editability(small_view("llama", atlas), prompts, layers)
    assert refusal.value.param == param
