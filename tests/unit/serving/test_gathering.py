"""Gathered effects are what each version's effect does to its own rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from editing.deltas import Effect
from serving.gathering import Gathered, Share
from tests.models import random_effect

IN, OUT, IDS = 48, 40, 30
KINDS = ("rank1", "rank3", "dense", "sparse", "scale", "gated", "replacing", "all")

#: Rows and kinds of the versions in a row; "" is a version without an effect here.
Layout = list[tuple[int, str]]


def shares_of(layout: Layout, inputs: int = IN) -> list[Share]:
    shares, row = [], 0
    for seed, (rows, kind) in enumerate(layout):
        if kind:
            effect = random_effect(seed, OUT, inputs, kind)
            shares.append(Share(effect, row, row + rows))
        row += rows
    return shares


def one_by_one(shares: list[Share], x: Tensor, y: Tensor) -> Tensor:
    out = y.clone()
    for share in shares:
        rows = slice(share.start, share.stop)
        out[rows] = share.effect.apply(x[rows], y[rows])
    return out


def compare(shares: list[Share], total: int, dtype: torch.dtype = torch.float32) -> None:
    x, y = torch.randn(total, IN).to(dtype), torch.randn(total, OUT).to(dtype)
    expected = one_by_one(shares, x, y)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for gathered in (Gathered(shares, x.device), lasting(shares)):
        found = y.clone()
        gathered.add(x, found)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def lasting(shares: list[Share]) -> Gathered:
    """What computes shares that have been together for many steps."""
    gathered = Gathered(shares, torch.device("cpu"))
    if gathered._factors is not None:
        gathered._factors.steps = 1000
    return Gathered(shares, torch.device("cpu"), before=gathered)


def way_of(gathered: Gathered) -> str:
    assert gathered._factors is not None
    return gathered._factors._kind


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.sampled_from(["", *KINDS])), min_size=1, max_size=8
    ).filter(lambda layout: any(kind for _, kind in layout)),
    st.integers(0, 3),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_part_of_every_version(layout: Layout, padding: int, dtype: torch.dtype) -> None:
    compare(shares_of(layout), sum(rows for rows, _ in layout) + padding, dtype)


@pytest.mark.parametrize(
    ("layout", "way"),
    [
        ([(1, "rank1")] * 20, "batched"),
        ([(4, "rank3"), (4, "rank1"), (4, "rank3")], "batched"),
        ([(1, "rank1"), (3, ""), (2, "rank3"), (1, "rank1")], "masked"),
        ([(2, "rank20"), (1, "rank20"), (1, ""), (2, "rank20")] * 40, "batched"),
        ([(8, "rank20"), (7, "rank20"), (9, "rank3")] * 40, "batched"),
        ([(3000, "rank20"), (200, "rank20"), (40, "rank3")], "sliced"),
    ],
)
def test_each_way_of_low_rank(layout: Layout, way: str) -> None:
    shares = shares_of(layout)
    assert way_of(lasting(shares)) == way
    compare(shares, sum(rows for rows, _ in layout))


@pytest.mark.parametrize("rows", [1, 700])
def test_scales_by_row_and_by_version(rows: int) -> None:
    layout = [(rows, "scale"), (rows, ""), (2 * rows, "scale"), (rows, "scale"), (rows, "rank1")]
    compare(shares_of(layout), 6 * rows)


@pytest.mark.parametrize("rows", [1, 5])
def test_ids_instead_of_rows(rows: int) -> None:
    layout = [(rows, kind) for kind in ("rank1", "", "rank3", "scale", "sparse", "dense")]
    shares = shares_of(layout, inputs=IDS)
    ids, y = torch.randint(0, IDS, (6 * rows,)), torch.randn(6 * rows, OUT)
    expected = one_by_one(shares, torch.nn.functional.one_hot(ids, IDS).float(), y)
    Gathered(shares, y.device, by_ids=True).add(ids, y)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("rows", [(1, 1, 1), (1, 3, 2)])
def test_what_is_infinite_stays_with_its_version(rows: tuple[int, ...]) -> None:
    shares = shares_of([(count, "rank1") for count in rows])
    huge = Effect(A=torch.full((1, IN), 3e38), B=torch.full((OUT, 1), 3e38))
    shares[1] = Share(huge, shares[1].start, shares[1].stop)
    x, y = torch.ones(sum(rows), IN), torch.ones(sum(rows), OUT)
    Gathered(shares, y.device).add(x, y)
    finite = torch.isfinite(y).all(dim=1)
    own = torch.arange(sum(rows))
    assert torch.equal(finite, (own < shares[1].start) | (own >= shares[1].stop))


def test_factors_are_put_together_when_it_pays() -> None:
    """Not for one step; once for many, also when rows come and go."""

    def adapters(rows: int) -> list[Share]:
        return [Share(effect, rows * i, rows * (i + 1)) for i, effect in enumerate(effects)]

    effects = [random_effect(seed, 512, 512, "rank20") for seed in range(8)]
    x, y = torch.randn(8, 512), torch.randn(8, 512)
    gathered = Gathered(adapters(1), x.device)
    assert way_of(gathered) == "sliced"
    for _ in range(100):
        gathered.add(x, y)
    joined = Gathered(adapters(1), x.device, before=gathered)
    assert way_of(joined) == "batched"
    again = Gathered(adapters(2), x.device, before=joined)
    assert joined._factors is not None
    assert again._factors is not None
    assert again._factors._joined is joined._factors._joined
    effects[0] = random_effect(9, 512, 512, "rank20")
    assert way_of(Gathered(adapters(2), x.device, before=again)) == "sliced"
