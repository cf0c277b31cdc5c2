from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from serving.protocol import SamplingParams
from serving.sampling import Choice, Sampler, choose, combine, logprobs

LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5])
GREEDY = SamplingParams(temperature=0)


def tokens(rows: Tensor, *samplers: Sampler) -> list[int | None]:
    return [None if choice is None else choice.token for choice in choose(rows, samplers)]


def drawn(params: SamplingParams, times: int = 400, row: Tensor = LOGITS) -> Counter[int | None]:
    """How often each token comes; in one batch and one by one, which must be the same."""
    own, again = Sampler(params), Sampler(params)
    together = tokens(row.repeat(times, 1), *[own] * times)
    assert [tokens(row[None], again)[0] for _ in range(100)] == together[:100]
    return Counter(together)


def random_rows(rows: int, vocabulary: int) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)) * 2


def test_temperature_zero_is_the_argmax() -> None:
    rows = random_rows(5, 50)
    assert tokens(rows, *[Sampler(GREEDY)] * 5) == rows.argmax(-1).tolist()


def test_rows_of_one_step_are_chosen_each_its_own_way() -> None:
    samplers = [
        Sampler(GREEDY),
        Sampler(SamplingParams(top_k=1, seed=3)),
        Sampler(SamplingParams(temperature=1e-320)),
    ]
    assert tokens(LOGITS.repeat(3, 1), *samplers) == [1, 1, 1]
    assert choose(LOGITS[None][:0], []) == []


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


@pytest.mark.parametrize("vocabulary", [40, 3000])
@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 7},
        {"top_k": 700},
        {"top_p": 0.7},
        {"top_p": 0.999},
        {"min_p": 0.2},
        {"top_k": 30, "top_p": 0.6},
        {"top_k": 900, "top_p": 0.9999, "min_p": 1e-4},
        {"top_k": 600, "top_p": 0.3},
    ],
)
def test_the_same_tokens_remain_as_by_the_models_library(
    vocabulary: int, params: dict[str, Any]
) -> None:
    """Also where what remains is wider than the window in which it is looked for first."""
    row = random_rows(1, vocabulary)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(1.3)])
    if "top_k" in params:
        warpers.append(TopKLogitsWarper(params["top_k"]))
    if "top_p" in params:
        warpers.append(TopPLogitsWarper(params["top_p"]))
    if "min_p" in params:
        warpers.append(MinPLogitsWarper(params["min_p"]))
    expected = warpers(torch.tensor([[0]]), row)[0].softmax(-1)
    times = 4000
    counts = drawn(SamplingParams(temperature=1.3, seed=5, **params), times, row[0])
    assert set(counts) <= set(expected.nonzero()[:, 0].tolist())
    for token, share in enumerate(expected.tolist()):
        assert counts[token] == pytest.approx(share * times, abs=5 * (share * times) ** 0.5 + 1)


def test_what_has_no_probability_is_never_drawn() -> None:
    """Not even where rounding takes a draw to the very end."""
    row = torch.full((1, 6), -torch.inf)
    row[0, 2] = 0.0
    for params in (SamplingParams(seed=0), SamplingParams(seed=0, top_p=0.99)):
        sampler = Sampler(params)
        sampler.draw = lambda: 1.0  # type: ignore[method-assign]
        assert tokens(row, sampler) == [2]


def test_the_repetition_penalty_is_the_models_librarys() -> None:
    row = random_rows(1, 50)
    prompt, completion = (3, 9, 9), [20, 3]
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=1.7), prompt)
    shaped = row[0].clone()
    sampler.shape(shaped)
    for token in completion:
        sampler.accept(token)
    shaped = row[0].clone()
    sampler.shape(shaped)
    reference = RepetitionPenaltyLogitsProcessor(1.7)
    expected = reference(torch.tensor([[*prompt, *completion]]), row.clone())[0]
    assert shaped.equal(expected)
    assert not shaped.equal(row[0])


def test_presence_and_frequency_count_the_completion_alone() -> None:
    params = SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.25)
    sampler = Sampler(params, prompt=(0, 0, 0))
    sampler.shape(LOGITS.clone())
    for token in (1, 1, 4):
        sampler.accept(token)
    row = LOGITS.clone()
    sampler.shape(row)
    assert row.tolist() == [0.0, 2.0 - 0.5 - 2 * 0.25, 1.0, -1.0, 1.5 - 0.5 - 0.25]


def test_biases_are_added_and_an_end_may_not_come_too_early() -> None:
    biased = SamplingParams(temperature=0, logit_bias=((3, 100.0), (1, -1.0)))
    row = LOGITS.clone()
    Sampler(biased).shape(row)
    assert row.tolist() == [0.0, 1.0, 1.0, 99.0, 1.5]
    sampler = Sampler(SamplingParams(temperature=0, min_tokens=2), ends=frozenset({1, 4}))
    for expected in (2, 2, 1, 1):
        (token,) = tokens(LOGITS[None], sampler)
        assert token == expected
        sampler.accept(expected)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=11),
        SamplingParams(seed=11, top_p=0.9),
        SamplingParams(seed=11, min_p=0.01, top_k=40, repetition_penalty=1.2, logprobs=3),
        SamplingParams(temperature=0, presence_penalty=1, logprobs=20),
        SamplingParams(temperature=0, logprobs=0),
    ],
)
def test_a_request_gets_the_same_whatever_shares_the_batch(params: SamplingParams) -> None:
    """The same tokens and log-probabilities to the last bit."""
    rows = random_rows(20, 700)
    company = [
        SamplingParams(),
        GREEDY,
        SamplingParams(top_p=0.99999, logprobs=20),
        SamplingParams(temperature=0, logit_bias=((1, 50.0),), logprobs=1),
    ]

    def found(before: int, after: int) -> list[Choice | None]:
        own = Sampler(params, prompt=(1, 2))
        others = [Sampler(p) for p in company]
        samplers = [*others[:before], own, *others[:after]]
        choices = []
        for row in rows:
            choice = choose(row.repeat(len(samplers), 1), samplers)[before]
            assert choice is not None
            own.accept(choice.token)
            choices.append(choice)
        return choices

    alone = found(0, 0)
    assert found(4, 0) == alone
    assert found(1, 4) == alone


def test_seeds_differ_by_sign_too() -> None:
    row = random_rows(1, 700)[0]
    first, second = (drawn(SamplingParams(seed=seed), 100, row) for seed in (5, -5))
    assert first != second


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_choose_nothing_for_their_row_alone(bad: float) -> None:
    rows = LOGITS.repeat(3, 1)
    rows[1, 2] = bad
    samplers = [Sampler(SamplingParams(temperature=t, logprobs=1, seed=0)) for t in (0, 1, 0)]
    assert tokens(rows, *samplers) == [1, None, 1]


def test_a_token_that_cannot_be_is_no_harm() -> None:
    row = LOGITS.clone()
    row[1] = -float("inf")
    assert tokens(row[None], Sampler(GREEDY)) == [4]


def test_logprobs_are_of_the_models_own_distribution() -> None:
    expected = LOGITS.log_softmax(0)
    best = tuple((token, float(expected[token])) for token in (1, 4, 2))
    assert logprobs(LOGITS[None], [2], 3) == [Choice(2, float(expected[2]), best)]
    assert logprobs(LOGITS[None], [2], 0) == [Choice(2, float(expected[2]))]
    shaped = SamplingParams(temperature=0, logit_bias=((0, 100.0),), logprobs=3)
    assert choose(LOGITS[None], [Sampler(shaped)]) == [Choice(0, float(expected[0]), best)]


def test_proxy_decoding_adds_the_experts_difference() -> None:
    rows = random_rows(3, 50)
    assert combine(rows, 1.5).equal(rows[0] + 1.5 * (rows[1] - rows[2]))
    assert combine(rows, 0.0).equal(rows[0])
