from __future__ import annotations

from collections import Counter

import pytest
import torch

from serving.protocol import SamplingParams
from serving.sampling import Sampler, choose, logprobs

LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5])


def drawn(params: SamplingParams, times: int = 400) -> Counter[int]:
    sampler = Sampler(params)
    return Counter(sampler.sample(LOGITS) for _ in range(times))


def test_temperature_zero_is_the_argmax() -> None:
    rows = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    samplers = [Sampler(SamplingParams(temperature=0)) for _ in range(5)]
    assert choose(rows, samplers) == rows.argmax(-1).tolist()


def test_rows_of_one_step_are_chosen_each_its_own_way() -> None:
    rows = LOGITS.repeat(3, 1)
    samplers = [
        Sampler(SamplingParams(temperature=0)),
        Sampler(SamplingParams(top_k=1, seed=3)),
        Sampler(SamplingParams(temperature=1e-320)),
    ]
    assert choose(rows, samplers) == [1, 1, 1]
    assert choose(rows[:0], []) == []


def test_sampling_follows_the_distribution() -> None:
    counts = drawn(SamplingParams(seed=0), 4000)
    expected = LOGITS.softmax(0) * 4000
    for token, count in enumerate(expected.tolist()):
        assert counts[token] == pytest.approx(count, abs=4 * count**0.5)


def test_temperature_sharpens() -> None:
    assert drawn(SamplingParams(temperature=0.2, seed=0))[1] > 350
    assert drawn(SamplingParams(temperature=50.0, seed=0))[1] < 150


def test_top_k_and_top_p_leave_only_the_likely() -> None:
    assert set(drawn(SamplingParams(top_k=2, seed=0))) == {1, 4}
    # probabilities in order: 0.43, 0.26, 0.16, 0.06, 0.02
    assert set(drawn(SamplingParams(top_p=0.4, seed=0))) == {1}
    assert set(drawn(SamplingParams(top_p=0.6, seed=0))) == {1, 4}
    assert set(drawn(SamplingParams(top_p=0.6, top_k=1, seed=0))) == {1}


def test_a_seed_repeats_whatever_shares_the_batch() -> None:
    rows = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))

    def tokens(company: int) -> list[int | None]:
        own = Sampler(SamplingParams(seed=11))
        others = [Sampler(SamplingParams(seed=None)) for _ in range(company)]
        return [choose(row.repeat(company + 1, 1), [*others, own])[-1] for row in rows]

    assert tokens(0) == tokens(4)
    assert tokens(0) != [Sampler(SamplingParams(seed=12)).sample(row) for row in rows]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_choose_nothing_for_their_row_alone(bad: float) -> None:
    rows = LOGITS.repeat(3, 1)
    rows[1, 2] = bad
    samplers = [Sampler(SamplingParams(temperature=t)) for t in (0, 1, 0)]
    assert choose(rows, samplers) == [1, None, 1]


def test_a_token_that_cannot_be_is_no_harm() -> None:
    row = LOGITS.clone()
    row[1] = -float("inf")
    assert choose(row[None], [Sampler(SamplingParams(temperature=0))]) == [4]


def test_logprobs_are_of_the_models_own_distribution() -> None:
    value, best = logprobs(LOGITS, 2, 3)
    expected = LOGITS.log_softmax(0)
    assert value == float(expected[2])
    assert best == [(token, float(expected[token])) for token in (1, 4, 2)]
    assert logprobs(LOGITS, 2, 0) == (value, [])
